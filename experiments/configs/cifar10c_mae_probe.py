"""CIFAR-10, JPEG q75, level 5: masked reconstruction with a frozen encoder's classifier.

Command: ``python -m experiments.train --workdir=W
--config=experiments/configs/cifar10c_mae_probe.py``, then the same with ``experiments.adapt``; the
data are those of ``cifar10c_level5.py``. ``--config.data.test=test`` takes all test images.

Cost: on one H100 in bfloat16 four to six minutes of training and four of adapting.

Expect: the error falls by 2.8 % (relative), as with the mean over 32 views;
frost gains 12 points, motion blur loses 3. Published, on ImageNet-C with a ViT-L encoder, mean
accuracy rises from 32.1 % to 43.3 % (Gandelsman et al. 2022, as read in the plots of
killian31/ttt_mae_online, a reproduction).

As in the paper, the encoder learns from reconstruction alone, and the classifier is a transformer
on its tokens (ViT probing): the gradient of the classification stops at the encoder. Other than
there, both learn in one run instead of one after the other, the network is small, and it saw
49,000 images. The inner loop is that of ``cifar10c_mae.py``, where the encoder learned both tasks.
"""

import ml_collections

from experiments.configs import cifar10c_mae


def get_config() -> ml_collections.ConfigDict:
    """The configuration of the ViT that is probed."""
    config = cifar10c_mae.get_config()
    config.model.head_depth = 4
    config.train.main_select = "params/head.*"
    return config
