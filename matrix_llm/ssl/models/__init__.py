"""The networks: a `transformers` backbone with the heads and the target network of one method.

Read `ssl_model.py` first. `ssl_config.py` is its configuration, `heads.py` the projector and the predictor,
`backbones.py` what a backbone must provide, `loading.py` loads one, `small_resnet.py` is one for small images, and
`sync_batch_norm.py` is batch normalisation over all ranks.
"""
