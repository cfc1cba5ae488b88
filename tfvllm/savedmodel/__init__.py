"""What a SavedModel's folder holds, read and written without Keras: protos, weights, manifest, versions, warm-up."""
