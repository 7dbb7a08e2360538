"""A pretrained ResNet for other libraries. The command is `ssl/export.py`.

Read `layers.py` first: the names of the layers in each library. Then `torchvision.py`, `detectron2.py` and `detr.py`.
"""
