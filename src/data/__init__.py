"""From records to batches."""

import os

# albumentations would look for a newer version online
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
