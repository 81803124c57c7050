"""A module per page; each draws what `streaming.dashboard.data` tells."""
