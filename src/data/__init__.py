"""From records to batches."""

import os

import cv2

# albumentations would look for a newer version online
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
cv2.setNumThreads(0)  # OpenCV's threads of several loader processes would compete for the cores
