"""Training images: reading data sets and labels, splitting them, and computing their features on Spark. Also records
which images a model was fitted on."""
