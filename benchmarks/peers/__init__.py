"""Other implementations of the same work, for comparison, each tuned as its documentation recommends."""
