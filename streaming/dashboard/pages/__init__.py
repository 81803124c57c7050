"""The pages of the dashboard, one module each. A page draws the results of `streaming.dashboard.data`."""
