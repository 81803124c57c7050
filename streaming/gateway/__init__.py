"""The HTTP gateway for programs without a Kafka client: publishes images, and serves predictions from the tables.

Start with `app.py` for the application and `routes.py` for its routes.
"""
