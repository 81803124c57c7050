"""Model training as batch jobs alongside the stream: fitting, evaluation, comparison with the champion, and
hyperparameter search. A candidate becomes a registered version, and the champion if it passes the gate.
"""
