"""YOLOv3 on PASCAL VOC, from photographs to a Space."""
