"""Images and labels in: data sets, splits, and the features computed of them."""
