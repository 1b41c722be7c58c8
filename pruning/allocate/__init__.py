"""Choose how many weights each layer keeps."""
