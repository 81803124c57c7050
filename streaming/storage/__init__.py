"""The state of the service: stores of small objects, the home, the Delta tables, and their logs and files.

Start with `home.py` for the layout, `store.py` for the objects and `tables.py` for the schemas.
"""
