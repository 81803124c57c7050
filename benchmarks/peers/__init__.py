"""Peers: other ways to do the same work, each tuned as its documentation says."""
