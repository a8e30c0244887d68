"""What each image format looks like inside, and Pillow for whatever DALI does not decode alike."""
