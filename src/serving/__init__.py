"""What answers for an image: reading, prediction, explanation, app and Space."""
