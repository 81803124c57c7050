"""Reports on model quality, from the tables or a model's held-out images. They are written as tables, plots, or a
self-contained HTML page."""
