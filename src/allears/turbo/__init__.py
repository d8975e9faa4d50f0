"""Making a trained model faster: sparse-linear attention, fitted to it layer by layer."""
