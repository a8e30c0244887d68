"""Use of a trained model: `load`, `Model.encode`, lists of images, and files of vectors."""
