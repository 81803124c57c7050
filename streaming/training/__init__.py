"""Fitting, judging, promoting and searching models, beside the stream."""
