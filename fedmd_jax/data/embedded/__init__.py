"""The data set inside the package: MNIST digits as public data, EMNIST letters a-f as private data."""
