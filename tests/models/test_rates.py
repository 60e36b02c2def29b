"""Golden rates: the multiplier of every parameter of real networks, against numbers written by hand.

The rule is the papers'. For a vision transformer of n blocks it is that of BEiT (Bao et al. 2022) and MAE (He et al.
2022), as their code has it (``get_num_layer_for_vit``, ``get_layer_id_for_vit``): tokens, position and patch embedding
decay n + 1 times, block i (from 0) n - i times, everything else (last norm, head) not at all; register tokens are
embeddings, as in DINOv2. For VGG and ResNet it is that of the Flowers-102 article. Other families are read in the same
way: a step for every block and for every convolution that stands alone; what leads to a block goes with it, the last
norm with the head.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

import pytest
from places import ROOT
from timm.optim import param_groups_layer_decay

from tlx import models
from tlx.base.layers import Granularity, LayerMap
from tlx.models import Backbone
from tlx.plan import layer_decay
from tlx.plan.config import Config, load, parse
from tlx.plan.plan import Plan
from tlx.train import components as parts
from tlx.train.step import set_rates

# 0.75 ** 0, 0.75 ** 1 ... to eight digits
POWERS = (
    *(1.0, 0.75, 0.5625, 0.421875, 0.31640625, 0.23730469, 0.17797852, 0.13348389, 0.10011292, 0.075084686),
    *(0.056313515, 0.042235136, 0.031676352, 0.023757264, 0.017817948, 0.013363461, 0.010022596, 0.0075169468),
    *(0.0056377101, 0.0042282826, 0.0031712119, 0.002378409, 0.0017838067, 0.001337855, 0.0010033913, 0.00075254346),
    *(0.00056440759, 0.0004233057, 0.00031747927, 0.00023810945, 0.00017858209, 0.00013393657, 0.00010045243),
    *(7.5339319e-05, 5.6504489e-05, 4.2378367e-05, 3.1783775e-05, 2.3837831e-05, 1.7878374e-05, 1.340878e-05),
    *(1.0056585e-05, 7.5424389e-06, 5.6568292e-06, 4.2426219e-06, 3.1819664e-06, 2.3864748e-06, 1.7898561e-06),
    *(1.3423921e-06, 1.0067941e-06, 7.5509554e-07, 5.6632166e-07, 4.2474124e-07, 3.1855593e-07, 2.3891695e-07),
    *(1.7918771e-07, 1.3439078e-07, 1.0079309e-07, 7.5594816e-08, 5.6696112e-08, 4.2522084e-08),
)

# 0.65 ** 0 ... : what BEiT and MAE take for their base models
POWERS_OF_65 = (
    *(1.0, 0.65, 0.4225, 0.274625, 0.17850625, 0.11602906, 0.075418891, 0.049022279, 0.031864481, 0.020711913),
    *(0.013462743, 0.0087507832, 0.0056880091, 0.0036972059),
)

# (1/3) ** 0 ... : the article's ResNets
THIRDS = (1.0, 0.33333333, 0.11111111, 0.037037037, 0.012345679, 0.0041152263, 0.0013717421)

# A straight line from 1 to 0.001, by the number of steps: 1 - 0.999 * step / steps
LINES = {
    5: (1.0, 0.8002, 0.6004, 0.4006, 0.2008, 0.001),
    6: (1.0, 0.8335, 0.667, 0.5005, 0.334, 0.1675, 0.001),
    9: (1.0, 0.889, 0.778, 0.667, 0.556, 0.445, 0.334, 0.223, 0.112, 0.001),
    12: (1.0, 0.91675, 0.8335, 0.75025, 0.667, 0.58375, 0.5005, 0.41725, 0.334, 0.25075, 0.1675, 0.08425, 0.001),
    13: (
        *(1.0, 0.92315385, 0.84630769, 0.76946154, 0.69261538, 0.61576923, 0.53892308, 0.46207692, 0.38523077),
        *(0.30838462, 0.23153846, 0.15469231, 0.077846154, 0.001),
    ),
    17: (
        *(1.0, 0.94123529, 0.88247059, 0.82370588, 0.76494118, 0.70617647, 0.64741176, 0.58864706, 0.52988235),
        *(0.47111765, 0.41235294, 0.35358824, 0.29482353, 0.23605882, 0.17729412, 0.11852941, 0.059764706, 0.001),
    ),
    18: (
        *(1.0, 0.9445, 0.889, 0.8335, 0.778, 0.7225, 0.667, 0.6115, 0.556, 0.5005, 0.445, 0.3895, 0.334, 0.2785),
        *(0.223, 0.1675, 0.112, 0.0565, 0.001),
    ),
    19: (
        *(1.0, 0.94742105, 0.89484211, 0.84226316, 0.78968421, 0.73710526, 0.68452632, 0.63194737, 0.57936842),
        *(0.52678947, 0.47421053, 0.42163158, 0.36905263, 0.31647368, 0.26389474, 0.21131579, 0.15873684),
        *(0.10615789, 0.053578947, 0.001),
    ),
    27: (
        *(1.0, 0.963, 0.926, 0.889, 0.852, 0.815, 0.778, 0.741, 0.704, 0.667, 0.63, 0.593, 0.556, 0.519, 0.482),
        *(0.445, 0.408, 0.371, 0.334, 0.297, 0.26, 0.223, 0.186, 0.149, 0.112, 0.075, 0.038, 0.001),
    ),
    44: (
        *(1.0, 0.97729545, 0.95459091, 0.93188636, 0.90918182, 0.88647727, 0.86377273, 0.84106818, 0.81836364),
        *(0.79565909, 0.77295455, 0.75025, 0.72754545, 0.70484091, 0.68213636, 0.65943182, 0.63672727, 0.61402273),
        *(0.59131818, 0.56861364, 0.54590909, 0.52320455, 0.5005, 0.47779545, 0.45509091, 0.43238636, 0.40968182),
        *(0.38697727, 0.36427273, 0.34156818, 0.31886364, 0.29615909, 0.27345455, 0.25075, 0.22804545, 0.20534091),
        *(0.18263636, 0.15993182, 0.13722727, 0.11452273, 0.091818182, 0.069113636, 0.046409091, 0.023704545, 0.001),
    ),
    59: (
        *(1.0, 0.9830678, 0.96613559, 0.94920339, 0.93227119, 0.91533898, 0.89840678, 0.88147458, 0.86454237),
        *(0.84761017, 0.83067797, 0.81374576, 0.79681356, 0.77988136, 0.76294915, 0.74601695, 0.72908475, 0.71215254),
        *(0.69522034, 0.67828814, 0.66135593, 0.64442373, 0.62749153, 0.61055932, 0.59362712, 0.57669492, 0.55976271),
        *(0.54283051, 0.52589831, 0.5089661, 0.4920339, 0.47510169, 0.45816949, 0.44123729, 0.42430508, 0.40737288),
        *(0.39044068, 0.37350847, 0.35657627, 0.33964407, 0.32271186, 0.30577966, 0.28884746, 0.27191525, 0.25498305),
        *(0.23805085, 0.22111864, 0.20418644, 0.18725424, 0.17032203, 0.15338983, 0.13645763, 0.11952542, 0.10259322),
        *(0.085661017, 0.068728814, 0.05179661, 0.034864407, 0.017932203, 0.001),
    ),
}

# How many steps lie between what a parameter's name begins with and the head: a number, then the beginnings it is for.
TWELVE_BLOCKS = """
    12 blocks.0. 11 blocks.1. 10 blocks.2. 9 blocks.3. 8 blocks.4. 7 blocks.5.
    6 blocks.6. 5 blocks.7. 4 blocks.8. 3 blocks.9. 2 blocks.10. 1 blocks.11.
"""
RESNET50 = """
    17 conv1. bn1.
    16 layer1.0. 15 layer1.1. 14 layer1.2.
    13 layer2.0. 12 layer2.1. 11 layer2.2. 10 layer2.3.
    9 layer3.0. 8 layer3.1. 7 layer3.2. 6 layer3.3. 5 layer3.4. 4 layer3.5.
    3 layer4.0. 2 layer4.1. 1 layer4.2.
    0 fc.
"""
BLOCKS = {
    "torchvision/alexnet": """
        5 features.0. 4 features.3. 3 features.6. 2 features.8. 1 features.10.
        0 classifier.1. classifier.4. classifier.6.
    """,
    "torchvision/vgg16": """
        13 features.0. 12 features.2.
        11 features.5. 10 features.7.
        9 features.10. 8 features.12. 7 features.14.
        6 features.17. 5 features.19. 4 features.21.
        3 features.24. 2 features.26. 1 features.28.
        0 classifier.0. classifier.3. classifier.6.
    """,
    "torchvision/vgg16_bn": """
        13 features.0. features.1. 12 features.3. features.4.
        11 features.7. features.8. 10 features.10. features.11.
        9 features.14. features.15. 8 features.17. features.18. 7 features.20. features.21.
        6 features.24. features.25. 5 features.27. features.28. 4 features.30. features.31.
        3 features.34. features.35. 2 features.37. features.38. 1 features.40. features.41.
        0 classifier.0. classifier.3. classifier.6.
    """,
    "torchvision/resnet18": """
        9 conv1. bn1.
        8 layer1.0. 7 layer1.1. 6 layer2.0. 5 layer2.1. 4 layer3.0. 3 layer3.1. 2 layer4.0. 1 layer4.1.
        0 fc.
    """,
    "torchvision/resnet50": RESNET50,
    "torchvision/mobilenet_v2": """
        19 features.0. 18 features.1. 17 features.2. 16 features.3. 15 features.4. 14 features.5. 13 features.6.
        12 features.7. 11 features.8. 10 features.9. 9 features.10. 8 features.11. 7 features.12. 6 features.13.
        5 features.14. 4 features.15. 3 features.16. 2 features.17. 1 features.18.
        0 classifier.1.
    """,
    "torchvision/mobilenet_v3_small": """
        13 features.0. 12 features.1. 11 features.2. 10 features.3. 9 features.4. 8 features.5. 7 features.6.
        6 features.7. 5 features.8. 4 features.9. 3 features.10. 2 features.11. 1 features.12.
        0 classifier.0. classifier.3.
    """,
    "torchvision/efficientnet_b0": """
        18 features.0.
        17 features.1.0.
        16 features.2.0. 15 features.2.1.
        14 features.3.0. 13 features.3.1.
        12 features.4.0. 11 features.4.1. 10 features.4.2.
        9 features.5.0. 8 features.5.1. 7 features.5.2.
        6 features.6.0. 5 features.6.1. 4 features.6.2. 3 features.6.3.
        2 features.7.0.
        1 features.8.
        0 classifier.1.
    """,
    "torchvision/convnext_tiny": """
        19 features.0.
        18 features.1.0. 17 features.1.1. 16 features.1.2.
        15 features.2. features.3.0. 14 features.3.1. 13 features.3.2.
        12 features.4. features.5.0. 11 features.5.1. 10 features.5.2. 9 features.5.3. 8 features.5.4.
        7 features.5.5. 6 features.5.6. 5 features.5.7. 4 features.5.8.
        3 features.6. features.7.0. 2 features.7.1. 1 features.7.2.
        0 classifier.0. classifier.2.
    """,
    "torchvision/densenet121": """
        59 features.conv0. features.norm0.
        58 features.denseblock1.denselayer1. 57 features.denseblock1.denselayer2. 56 features.denseblock1.denselayer3.
        55 features.denseblock1.denselayer4. 54 features.denseblock1.denselayer5. 53 features.denseblock1.denselayer6.
        52 features.transition1. features.denseblock2.denselayer1. 51 features.denseblock2.denselayer2.
        50 features.denseblock2.denselayer3. 49 features.denseblock2.denselayer4. 48 features.denseblock2.denselayer5.
        47 features.denseblock2.denselayer6. 46 features.denseblock2.denselayer7. 45 features.denseblock2.denselayer8.
        44 features.denseblock2.denselayer9. 43 features.denseblock2.denselayer10.
        42 features.denseblock2.denselayer11. 41 features.denseblock2.denselayer12.
        40 features.transition2. features.denseblock3.denselayer1. 39 features.denseblock3.denselayer2.
        38 features.denseblock3.denselayer3. 37 features.denseblock3.denselayer4. 36 features.denseblock3.denselayer5.
        35 features.denseblock3.denselayer6. 34 features.denseblock3.denselayer7. 33 features.denseblock3.denselayer8.
        32 features.denseblock3.denselayer9. 31 features.denseblock3.denselayer10.
        30 features.denseblock3.denselayer11. 29 features.denseblock3.denselayer12.
        28 features.denseblock3.denselayer13. 27 features.denseblock3.denselayer14.
        26 features.denseblock3.denselayer15. 25 features.denseblock3.denselayer16.
        24 features.denseblock3.denselayer17. 23 features.denseblock3.denselayer18.
        22 features.denseblock3.denselayer19. 21 features.denseblock3.denselayer20.
        20 features.denseblock3.denselayer21. 19 features.denseblock3.denselayer22.
        18 features.denseblock3.denselayer23. 17 features.denseblock3.denselayer24.
        16 features.transition3. features.denseblock4.denselayer1. 15 features.denseblock4.denselayer2.
        14 features.denseblock4.denselayer3. 13 features.denseblock4.denselayer4. 12 features.denseblock4.denselayer5.
        11 features.denseblock4.denselayer6. 10 features.denseblock4.denselayer7. 9 features.denseblock4.denselayer8.
        8 features.denseblock4.denselayer9. 7 features.denseblock4.denselayer10. 6 features.denseblock4.denselayer11.
        5 features.denseblock4.denselayer12. 4 features.denseblock4.denselayer13. 3 features.denseblock4.denselayer14.
        2 features.denseblock4.denselayer15. 1 features.denseblock4.denselayer16.
        0 features.norm5. classifier.
    """,
    "torchvision/inception_v3": """
        12 Conv2d_1a_3x3. Conv2d_2a_3x3. Conv2d_2b_3x3. Conv2d_3b_1x1. Conv2d_4a_3x3.
        11 Mixed_5b. 10 Mixed_5c. 9 Mixed_5d. 8 Mixed_6a. 7 Mixed_6b. 6 Mixed_6c. 5 Mixed_6d. 4 Mixed_6e. AuxLogits.
        3 Mixed_7a. 2 Mixed_7b. 1 Mixed_7c.
        0 fc.
    """,
    "torchvision/vit_b_16": """
        13 class_token encoder.pos_embedding conv_proj.
        12 encoder.layers.encoder_layer_0. 11 encoder.layers.encoder_layer_1. 10 encoder.layers.encoder_layer_2.
        9 encoder.layers.encoder_layer_3. 8 encoder.layers.encoder_layer_4. 7 encoder.layers.encoder_layer_5.
        6 encoder.layers.encoder_layer_6. 5 encoder.layers.encoder_layer_7. 4 encoder.layers.encoder_layer_8.
        3 encoder.layers.encoder_layer_9. 2 encoder.layers.encoder_layer_10. 1 encoder.layers.encoder_layer_11.
        0 encoder.ln. heads.head.
    """,
    "torchvision/swin_t": """
        13 features.0.
        12 features.1.0. 11 features.1.1.
        10 features.2. features.3.0. 9 features.3.1.
        8 features.4. features.5.0. 7 features.5.1. 6 features.5.2. 5 features.5.3. 4 features.5.4. 3 features.5.5.
        2 features.6. features.7.0. 1 features.7.1.
        0 norm. head.
    """,
    "torchvision/maxvit_t": """
        12 stem.
        11 blocks.0.layers.0. 10 blocks.0.layers.1.
        9 blocks.1.layers.0. 8 blocks.1.layers.1.
        7 blocks.2.layers.0. 6 blocks.2.layers.1. 5 blocks.2.layers.2. 4 blocks.2.layers.3. 3 blocks.2.layers.4.
        2 blocks.3.layers.0. 1 blocks.3.layers.1.
        0 classifier.2. classifier.3. classifier.5.
    """,
    "torchvision/regnet_y_400mf": """
        17 stem.
        16 trunk_output.block1.block1-0.
        15 trunk_output.block2.block2-0. 14 trunk_output.block2.block2-1. 13 trunk_output.block2.block2-2.
        12 trunk_output.block3.block3-0. 11 trunk_output.block3.block3-1. 10 trunk_output.block3.block3-2.
        9 trunk_output.block3.block3-3. 8 trunk_output.block3.block3-4. 7 trunk_output.block3.block3-5.
        6 trunk_output.block4.block4-0. 5 trunk_output.block4.block4-1. 4 trunk_output.block4.block4-2.
        3 trunk_output.block4.block4-3. 2 trunk_output.block4.block4-4. 1 trunk_output.block4.block4-5.
        0 fc.
    """,
    "timm/resnet50": RESNET50,
    "timm/vit_tiny_patch16_224": f"13 cls_token pos_embed patch_embed. {TWELVE_BLOCKS} 0 norm. head.",
    "timm/vit_base_patch16_224": f"13 cls_token pos_embed patch_embed. {TWELVE_BLOCKS} 0 norm. head.",
    "timm/deit_tiny_distilled_patch16_224": f"""
        13 cls_token dist_token pos_embed patch_embed. {TWELVE_BLOCKS} 0 norm. head. head_dist.
    """,
    "timm/beit_base_patch16_224": f"13 cls_token patch_embed. {TWELVE_BLOCKS} 0 fc_norm. head.",
    "timm/eva02_tiny_patch14_336": f"13 cls_token pos_embed patch_embed. {TWELVE_BLOCKS} 0 fc_norm. head.",
    "timm/vit_small_patch14_reg4_dinov2": f"""
        13 cls_token reg_token pos_embed patch_embed. {TWELVE_BLOCKS} 0 norm. head.
    """,
    "timm/vit_small_patch16_dinov3": f"13 cls_token reg_token patch_embed. {TWELVE_BLOCKS} 0 norm. head.",
    "timm/swin_tiny_patch4_window7_224": """
        13 patch_embed.
        12 layers.0.blocks.0. 11 layers.0.blocks.1.
        10 layers.1.downsample. layers.1.blocks.0. 9 layers.1.blocks.1.
        8 layers.2.downsample. layers.2.blocks.0. 7 layers.2.blocks.1. 6 layers.2.blocks.2.
        5 layers.2.blocks.3. 4 layers.2.blocks.4. 3 layers.2.blocks.5.
        2 layers.3.downsample. layers.3.blocks.0. 1 layers.3.blocks.1.
        0 norm. head.fc.
    """,
    "timm/convnext_tiny": """
        19 stem.
        18 stages.0.blocks.0. 17 stages.0.blocks.1. 16 stages.0.blocks.2.
        15 stages.1.downsample. stages.1.blocks.0. 14 stages.1.blocks.1. 13 stages.1.blocks.2.
        12 stages.2.downsample. stages.2.blocks.0. 11 stages.2.blocks.1. 10 stages.2.blocks.2.
        9 stages.2.blocks.3. 8 stages.2.blocks.4. 7 stages.2.blocks.5.
        6 stages.2.blocks.6. 5 stages.2.blocks.7. 4 stages.2.blocks.8.
        3 stages.3.downsample. stages.3.blocks.0. 2 stages.3.blocks.1. 1 stages.3.blocks.2.
        0 head.norm. head.fc.
    """,
    "timm/efficientnet_b0": """
        18 conv_stem. bn1.
        17 blocks.0.0.
        16 blocks.1.0. 15 blocks.1.1.
        14 blocks.2.0. 13 blocks.2.1.
        12 blocks.3.0. 11 blocks.3.1. 10 blocks.3.2.
        9 blocks.4.0. 8 blocks.4.1. 7 blocks.4.2.
        6 blocks.5.0. 5 blocks.5.1. 4 blocks.5.2. 3 blocks.5.3.
        2 blocks.6.0.
        1 conv_head. bn2.
        0 classifier.
    """,
    "timm/mobilenetv2_100": """
        19 conv_stem. bn1.
        18 blocks.0.0.
        17 blocks.1.0. 16 blocks.1.1.
        15 blocks.2.0. 14 blocks.2.1. 13 blocks.2.2.
        12 blocks.3.0. 11 blocks.3.1. 10 blocks.3.2. 9 blocks.3.3.
        8 blocks.4.0. 7 blocks.4.1. 6 blocks.4.2.
        5 blocks.5.0. 4 blocks.5.1. 3 blocks.5.2.
        2 blocks.6.0.
        1 conv_head. bn2.
        0 classifier.
    """,
    "timm/maxvit_tiny_tf_224": """
        12 stem.
        11 stages.0.blocks.0. 10 stages.0.blocks.1.
        9 stages.1.blocks.0. 8 stages.1.blocks.1.
        7 stages.2.blocks.0. 6 stages.2.blocks.1. 5 stages.2.blocks.2. 4 stages.2.blocks.3. 3 stages.2.blocks.4.
        2 stages.3.blocks.0. 1 stages.3.blocks.1.
        0 head.norm. head.pre_logits. head.fc.
    """,
    "timm/mixer_s16_224": """
        9 stem.
        8 blocks.0. 7 blocks.1. 6 blocks.2. 5 blocks.3. 4 blocks.4. 3 blocks.5. 2 blocks.6. 1 blocks.7.
        0 norm. head.
    """,
    "timm/cait_xxs24_224": """
        27 cls_token pos_embed patch_embed.
        26 blocks.0. 25 blocks.1. 24 blocks.2. 23 blocks.3. 22 blocks.4. 21 blocks.5. 20 blocks.6. 19 blocks.7.
        18 blocks.8. 17 blocks.9. 16 blocks.10. 15 blocks.11. 14 blocks.12. 13 blocks.13. 12 blocks.14. 11 blocks.15.
        10 blocks.16. 9 blocks.17. 8 blocks.18. 7 blocks.19. 6 blocks.20. 5 blocks.21. 4 blocks.22. 3 blocks.23.
        2 blocks_token_only.0. 1 blocks_token_only.1.
        0 norm. head.
    """,
}

# The article's layers: 44 feature modules of VGG, its ReLUs and poolings counted; ResNet's conv1, bn1, layer1-4, fc
RESNET_MODULES = "6 conv1. 5 bn1. 4 layer1. 3 layer2. 2 layer3. 1 layer4. 0 fc."
# the same network in the other library
BLOCKS["timm/densenet121"] = BLOCKS["torchvision/densenet121"]

MODULES = {
    "torchvision/vgg16_bn": """
        44 features.0. 43 features.1. 41 features.3. 40 features.4.
        37 features.7. 36 features.8. 34 features.10. 33 features.11.
        30 features.14. 29 features.15. 27 features.17. 26 features.18. 24 features.20. 23 features.21.
        20 features.24. 19 features.25. 17 features.27. 16 features.28. 14 features.30. 13 features.31.
        10 features.34. 9 features.35. 7 features.37. 6 features.38. 4 features.40. 3 features.41.
        0 classifier.0. classifier.3. classifier.6.
    """,
    "torchvision/resnet18": RESNET_MODULES,
    "torchvision/resnet50": RESNET_MODULES,
    "torchvision/resnet152": RESNET_MODULES,
    "timm/resnet50": RESNET_MODULES,
}

_NUMBER = re.compile(r"[0-9.]+(e-[0-9]+)?")


def read(table: str) -> dict[str, float]:
    """The number that stands before each beginning of a name."""
    found: dict[str, float] = {}
    number = -1.0
    for word in table.split():
        if _NUMBER.fullmatch(word):
            number = float(word)
        else:
            assert word not in found
            found[word] = number
    return found


def spread(table: str, names: Iterable[str]) -> dict[str, float]:
    """The number of every parameter. Exactly one beginning fits each, and none stands there for nothing."""
    numbers = read(table)
    fitting = {name: [word for word in numbers if name.startswith(word)] for name in names}
    assert {name: words for name, words in fitting.items() if len(words) != 1} == {}
    assert set(numbers) == {words[0] for words in fitting.values()}
    return {name: numbers[words[0]] for name, words in fitting.items()}


IN_ALL = {*list(BLOCKS)[1::2], "torchvision/maxvit_t", "timm/maxvit_tiny_tf_224"}
"""Networks that the quick tier leaves out: to make one takes seconds."""


def each(names: Iterable[str]) -> list[object]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in IN_ALL)) for name in names]


@functools.cache
def network(name: str, granularity: Granularity = "block") -> Backbone:
    return models.load(name, classes=10, weights="none", empty=True, granularity=granularity)


def parameters(backbone: Backbone) -> list[str]:
    return [name for name, _ in backbone.module.named_parameters()]


def multipliers(layers: LayerMap, factors: Mapping[str, float]) -> dict[str, float]:
    return {p.name: factors[y.name] for y in layers for p in y.parameters}


def same(expected: Mapping[str, float]) -> object:
    return pytest.approx(dict(expected), rel=1e-6, abs=0)


@pytest.mark.parametrize("name", each(BLOCKS))
def test_exponential_decay(name: str) -> None:
    backbone = network(name)
    steps = spread(BLOCKS[name], parameters(backbone))
    found = multipliers(backbone.layers, layer_decay.exponential(backbone.layers, factor=0.75))
    assert found == same({p: POWERS[int(n)] for p, n in steps.items()})


@pytest.mark.parametrize("name", each(BLOCKS))
def test_linear_decay(name: str) -> None:
    backbone = network(name)
    steps = spread(BLOCKS[name], parameters(backbone))
    line = LINES[int(max(steps.values()))]
    found = multipliers(backbone.layers, layer_decay.linear(backbone.layers, ratio=0.001))
    assert found == same({p: line[int(n)] for p, n in steps.items()})


@pytest.mark.parametrize("name", ["timm/vit_base_patch16_224", "timm/beit_base_patch16_224", "torchvision/vit_b_16"])
def test_the_decay_of_beits_and_maes_base_models(name: str) -> None:
    backbone = network(name)
    steps = spread(BLOCKS[name], parameters(backbone))
    found = multipliers(backbone.layers, layer_decay.exponential(backbone.layers, factor=0.65))
    assert found == same({p: POWERS_OF_65[int(n)] for p, n in steps.items()})


@pytest.mark.parametrize("name", each(MODULES))
def test_decay_over_the_articles_modules(name: str) -> None:
    backbone = network(name, "module")
    steps = spread(MODULES[name], parameters(backbone))
    line = LINES[int(max(steps.values()))]
    found = multipliers(backbone.layers, layer_decay.linear(backbone.layers, ratio=0.001))
    assert found == same({p: line[int(n)] for p, n in steps.items()})
    if "resnet" in name:
        found = multipliers(backbone.layers, layer_decay.exponential(backbone.layers, factor=1 / 3))
        assert found == same({p: THIRDS[int(n)] for p, n in steps.items()})


# Parameters whose place is a question, by their full names, with 0.75 per block
PLACES = {
    "timm/vit_base_patch16_224": """
        0.023757264 cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias
        0.031676352 blocks.0.norm1.weight blocks.0.attn.qkv.bias 0.75 blocks.11.mlp.fc2.weight
        1.0 norm.weight norm.bias head.weight head.bias
    """,
    "timm/vit_base_patch16_siglip_224": """
        0.023757264 pos_embed patch_embed.proj.weight 0.031676352 blocks.0.norm1.weight 0.75 blocks.11.mlp.fc2.weight
        1.0 norm.weight attn_pool.latent attn_pool.kv.weight attn_pool.norm.weight head.weight
    """,
    "timm/resmlp_12_224": "0.023757264 stem.proj.weight 0.75 blocks.11.ls2 1.0 norm.alpha norm.beta head.weight",
    "timm/crossvit_tiny_240": "0.31640625 cls_token_0 pos_embed_1 1.0 norm.0.weight norm.1.weight head.0.weight",
    "timm/deit_tiny_distilled_patch16_224": "0.023757264 dist_token 1.0 norm.weight head_dist.weight",
    "timm/beit_base_patch16_224": """
        0.031676352 blocks.0.attn.relative_position_bias_table blocks.0.gamma_1 blocks.0.attn.q_bias
        0.75 blocks.11.attn.relative_position_bias_table blocks.11.gamma_2
        1.0 fc_norm.weight fc_norm.bias
    """,
    "timm/vit_small_patch14_reg4_dinov2": """
        0.023757264 reg_token cls_token pos_embed 0.031676352 blocks.0.ls1.gamma 1.0 norm.weight
    """,
    "timm/vit_small_patch16_dinov3": "0.023757264 reg_token cls_token 0.75 blocks.11.gamma_1 1.0 norm.bias",
    "timm/cait_xxs24_224": """
        0.0004233057 cls_token pos_embed 0.421875 blocks.23.gamma_1 0.5625 blocks_token_only.0.gamma_1 1.0 norm.weight
    """,
    "timm/swin_tiny_patch4_window7_224": """
        0.023757264 patch_embed.norm.weight
        0.031676352 layers.0.blocks.0.attn.relative_position_bias_table
        0.056313515 layers.1.downsample.reduction.weight layers.1.downsample.norm.weight layers.1.blocks.0.norm1.weight
        1.0 norm.weight head.fc.weight
    """,
    "torchvision/swin_t": """
        0.031676352 features.1.0.attn.relative_position_bias_table
        0.5625 features.6.reduction.weight features.6.norm.weight features.7.0.norm1.weight
        1.0 norm.weight head.bias
    """,
    "timm/convnext_tiny": """
        0.0042282826 stem.0.weight stem.1.weight
        0.013363461 stages.1.downsample.0.weight stages.1.downsample.1.weight stages.1.blocks.0.gamma
        1.0 head.norm.weight head.fc.weight
    """,
    "torchvision/convnext_tiny": """
        0.013363461 features.2.0.weight features.2.1.weight features.3.0.layer_scale 1.0 classifier.0.weight
    """,
    "torchvision/resnet50": """
        0.0075169468 conv1.weight bn1.weight
        0.023757264 layer2.0.downsample.0.weight layer2.0.downsample.1.weight layer2.0.conv1.weight
        0.031676352 layer2.1.conv1.weight
    """,
    "torchvision/densenet121": "3.1855593e-07 features.transition1.conv.weight 1.0 features.norm5.weight",
    "torchvision/inception_v3": """
        0.75 Mixed_7c.branch1x1.bn.bias 0.31640625 AuxLogits.fc.weight AuxLogits.conv0.conv.weight 1.0 fc.weight
    """,
    "torchvision/maxvit_t": """
        0.75 blocks.3.layers.1.layers.MBconv.layers.pre_norm.weight
        blocks.3.layers.1.layers.grid_attention.attn_layer.1.relative_position_bias_table
        1.0 classifier.2.weight classifier.3.weight
    """,
    "torchvision/vgg16_bn": "0.75 features.40.weight features.41.weight 1.0 classifier.0.weight classifier.6.weight",
}


@pytest.mark.parametrize("name", each(PLACES))
def test_tokens_tables_norms_and_downsamplings(name: str) -> None:
    layers = network(name).layers
    found = multipliers(layers, layer_decay.exponential(layers, factor=0.75))
    assert {p: found[p] for p in read(PLACES[name])} == same(read(PLACES[name]))


class Fitted:
    """A plan and an optimizer over the parameters of a network, as a configuration makes them."""

    def __init__(self, config: Config, samples: int) -> None:
        backbone = parts.backbone_of(config, 10, empty=True)
        self.plan = Plan.make(config, backbone.layers, samples=samples)
        self.optimizer = parts.optimizer_of(config, backbone.module, backbone.layers)
        self.names = parameters(backbone)

    def rates(self, phase: int, step: int) -> dict[str, float]:
        """The rate of every parameter, as the loop leaves it in the optimizer at a step of a phase."""
        set_rates(self.optimizer, self.plan.phases[phase], self.plan.phases[phase].start + step)
        found = {name: group["lr"] for group in self.optimizer.param_groups for name in group["names"]}
        assert sorted(found) == sorted(self.names)
        return found


@functools.cache
def recipe(file: str, samples: int) -> Fitted:
    return Fitted(load(ROOT / "configs" / file), samples)


VGG_RATES = """
    1e-7 features.0. 2.3704545e-6 features.1. 6.9113636e-6 features.3. 9.1818182e-6 features.4.
    1.5993182e-5 features.7. 1.8263636e-5 features.8. 2.2804545e-5 features.10. 2.5075e-5 features.11.
    3.1886364e-5 features.14. 3.4156818e-5 features.15. 3.8697727e-5 features.17. 4.0968182e-5 features.18.
    4.5509091e-5 features.20. 4.7779545e-5 features.21. 5.4590909e-5 features.24. 5.6861364e-5 features.25.
    6.1402273e-5 features.27. 6.3672727e-5 features.28. 6.8213636e-5 features.30. 7.0484091e-5 features.31.
    7.7295455e-5 features.34. 7.9565909e-5 features.35. 8.4106818e-5 features.37. 8.6377273e-5 features.38.
    9.0918182e-5 features.40. 9.3188636e-5 features.41.
    1e-4 classifier.0. classifier.3. classifier.6.
"""
RESNET_RATES = """
    1.3717421e-7 conv1. 4.1152263e-7 bn1. 1.2345679e-6 layer1. 3.7037037e-6 layer2. 1.1111111e-5 layer3.
    3.3333333e-5 layer4. 1e-4 fc.
"""


@pytest.mark.parametrize(
    ("file", "first", "second"),
    [
        ("vgg16", "0.0 features. classifier.0. classifier.3. 1e-3 classifier.6.", VGG_RATES),
        ("resnet50", "0.0 conv1. bn1. layer1. layer2. layer3. layer4. 1e-3 fc.", RESNET_RATES),
    ],
    ids=["vgg16", "resnet50"],
)
def test_the_articles_rates_reach_the_optimizer(file: str, first: str, second: str) -> None:
    for phase, table in enumerate((first, second)):
        found = recipe(f"flowers102/{file}.yaml", 6149).rates(phase, step=7)
        assert found == same(spread(table, found))


@pytest.mark.parametrize(
    ("step", "table"),
    [  # eight steps of warm-up, then half a cosine over 112
        (
            8,
            """
            2.3757264e-6 cls_token pos_embed patch_embed.
            3.1676352e-6 blocks.0. 4.2235136e-6 blocks.1. 5.6313515e-6 blocks.2. 7.5084686e-6 blocks.3.
            1.0011292e-5 blocks.4. 1.3348389e-5 blocks.5. 1.7797852e-5 blocks.6. 2.3730469e-5 blocks.7.
            3.1640625e-5 blocks.8. 4.21875e-5 blocks.9. 5.625e-5 blocks.10. 7.5e-5 blocks.11.
            1e-4 norm. head.
            """,
        ),
        (
            64,
            """
            1.1878632e-6 cls_token pos_embed patch_embed.
            1.5838176e-6 blocks.0. 2.1117568e-6 blocks.1. 2.8156757e-6 blocks.2. 3.7542343e-6 blocks.3.
            5.0056458e-6 blocks.4. 6.6741943e-6 blocks.5. 8.8989258e-6 blocks.6. 1.1865234e-5 blocks.7.
            1.5820313e-5 blocks.8. 2.109375e-5 blocks.9. 2.8125e-5 blocks.10. 3.75e-5 blocks.11.
            5e-5 norm. head.
            """,
        ),
    ],
    ids=["top of the warm-up", "half way down"],
)
def test_the_rates_of_beit_and_mae_reach_the_optimizer(step: int, table: str) -> None:
    found = recipe("hymenoptera/vit.yaml", 244).rates(1, step=step)
    assert found == same(spread(table, found))


def test_a_factor_may_be_a_fraction_and_a_line_may_run_over_blocks() -> None:
    raw = {
        "run": "runs/x",
        "data": {"train": "shards/train", "batch": 32},
        "backbone": {"name": "torchvision/alexnet"},
        "unfreeze": "all",
    }
    for rule, table in (
        (
            {"name": "exponential", "factor": "1/3"},
            "4.1152263e-5 features.0. 1.2345679e-4 features.3. 3.7037037e-4 features.6. 1.1111111e-3 features.8. "
            "3.3333333e-3 features.10. 1e-2 classifier.",
        ),
        (
            {"name": "linear", "ratio": "0.001"},
            "1e-5 features.0. 2.008e-3 features.3. 4.006e-3 features.6. 6.004e-3 features.8. 8.002e-3 features.10. "
            "1e-2 classifier.",
        ),
    ):
        config = parse({**raw, "phases": {"each": {"duration": "1ep", "lr": 1e-2, "layer_decay": rule}}})
        found = Fitted(config, 64).rates(0, step=1)
        assert found == same(spread(table, found))


# Where timm's own groups give other steps, and why ours stand. The first reason is the common one:
LAST_NORM = "timm counts the last norm to the last block; for BEiT, MAE and DINOv2 it learns at the head's rate"
LAST_CONV = (
    "timm counts the convolution after the last block to that block; it is a layer, as torchvision's features.8 is"
)
TIMM_DIFFERS = {
    "timm/vit_tiny_patch16_224": (LAST_NORM, "1 norm."),
    "timm/vit_base_patch16_224": (LAST_NORM, "1 norm."),
    "timm/deit_tiny_distilled_patch16_224": (LAST_NORM, "1 norm."),
    "timm/deit3_small_patch16_224": (LAST_NORM, "1 norm."),
    "timm/vit_small_patch14_reg4_dinov2": (LAST_NORM, "1 norm."),
    "timm/vit_small_patch16_dinov3": (LAST_NORM, "1 norm."),
    "timm/swin_tiny_patch4_window7_224": (LAST_NORM, "1 norm."),
    "timm/mixer_s16_224": (LAST_NORM, "1 norm."),
    "timm/xcit_nano_12_p16_224": (LAST_NORM, "1 norm."),
    "timm/efficientnet_b0": (
        LAST_CONV,
        """
        17 conv_stem. bn1. 16 blocks.0.0. 15 blocks.1.0. 14 blocks.1.1. 13 blocks.2.0. 12 blocks.2.1. 11 blocks.3.0.
        10 blocks.3.1. 9 blocks.3.2. 8 blocks.4.0. 7 blocks.4.1. 6 blocks.4.2. 5 blocks.5.0. 4 blocks.5.1. 3 blocks.5.2.
        2 blocks.5.3. 1 blocks.6.0.
        """,
    ),
    "timm/mobilenetv2_100": (
        LAST_CONV,
        """
        18 conv_stem. bn1. 17 blocks.0.0. 16 blocks.1.0. 15 blocks.1.1. 14 blocks.2.0. 13 blocks.2.1. 12 blocks.2.2.
        11 blocks.3.0. 10 blocks.3.1. 9 blocks.3.2. 8 blocks.3.3. 7 blocks.4.0. 6 blocks.4.1. 5 blocks.4.2.
        4 blocks.5.0. 3 blocks.5.1. 2 blocks.5.2. 1 blocks.6.0.
        """,
    ),
    "timm/maxvit_tiny_tf_224": (
        "timm's finest groups are the four stages; the paper's block is convolution, window and grid attention",
        "5 stem. 4 stages.0. 3 stages.1. 2 stages.2. 1 stages.3.",
    ),
    "timm/cait_xxs24_224": (
        "timm numbers the two class-attention blocks beside the last two others; they run after them (and so timm has "
        "it for XCiT), and the last norm as above",
        """
        25 cls_token pos_embed patch_embed.
        24 blocks.0. 23 blocks.1. 22 blocks.2. 21 blocks.3. 20 blocks.4. 19 blocks.5. 18 blocks.6. 17 blocks.7.
        16 blocks.8. 15 blocks.9. 14 blocks.10. 13 blocks.11. 12 blocks.12. 11 blocks.13. 10 blocks.14. 9 blocks.15.
        8 blocks.16. 7 blocks.17. 6 blocks.18. 5 blocks.19. 4 blocks.20. 3 blocks.21. 2 blocks.22. 1 blocks.23. norm.
        """,
    ),
}
TIMM_AGREES = (
    *("timm/resnet18", "timm/resnet50", "timm/regnety_004", "timm/mobilenetv3_small_100"),
    *("timm/convnext_tiny", "timm/convnextv2_atto", "timm/beit_base_patch16_224", "timm/beitv2_base_patch16_224"),
    *("timm/eva02_tiny_patch14_336", "timm/vit_medium_patch16_reg4_gap_256", "timm/hiera_tiny_224"),
)


COMPARED = [*TIMM_AGREES, *TIMM_DIFFERS]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, n in enumerate(COMPARED)]
)
def test_timms_param_groups_layer_decay(name: str) -> None:
    """Equal to it, but for the differences listed above, each of them to the parameter."""
    backbone = network(name)
    names = {id(tensor): parameter for parameter, tensor in backbone.module.named_parameters()}
    groups = param_groups_layer_decay(backbone.module, layer_decay=0.75)
    theirs = {names[id(tensor)]: group["lr_scale"] for group in groups for tensor in group["params"]}
    expected = multipliers(backbone.layers, layer_decay.exponential(backbone.layers, factor=0.75))
    _reason, difference = TIMM_DIFFERS.get(name, ("", ""))
    for word, steps in read(difference).items():
        other = {parameter: POWERS[int(steps)] for parameter in expected if parameter.startswith(word)}
        assert other != {p: pytest.approx(expected[p], rel=1e-6) for p in other}, f"{word} does not differ"
        expected |= other
    assert theirs == same(expected)


def test_a_downsampling_decays_one_step_less_than_in_simmim() -> None:
    """SimMIM's rule for Swin counts it to the block before; ours, like timm's and ConvNeXt's, to the block after."""
    simmim = """
        13 patch_embed.
        12 layers.0.blocks.0. 11 layers.0.blocks.1. layers.1.downsample.
        10 layers.1.blocks.0. 9 layers.1.blocks.1. layers.2.downsample.
        8 layers.2.blocks.0. 7 layers.2.blocks.1. 6 layers.2.blocks.2. 5 layers.2.blocks.3. 4 layers.2.blocks.4.
        3 layers.2.blocks.5. layers.3.downsample.
        2 layers.3.blocks.0. 1 layers.3.blocks.1.
        0 norm. head.fc.
    """
    backbone = network("timm/swin_tiny_patch4_window7_224")
    theirs = {p: POWERS[int(n)] for p, n in spread(simmim, parameters(backbone)).items()}
    ours = multipliers(backbone.layers, layer_decay.exponential(backbone.layers, factor=0.75))
    assert {p: x for p, x in ours.items() if x != pytest.approx(theirs[p], rel=1e-6)} == same(
        {
            f"layers.{stage}.downsample.{p}": expected
            for stage, expected in ((1, 0.056313515), (2, 0.10011292), (3, 0.5625))  # theirs times 4/3
            for p in ("reduction.weight", "norm.weight", "norm.bias")
        }
    )


def test_convnexts_own_twelve_groups_can_be_written_out() -> None:
    """ConvNeXt was fine-tuned with three blocks to a step, numbered for the larger models; ours is a step a block."""
    official = """
        13 stem. 12 stages.0. 11 stages.1.
        10 stages.2.downsample. stages.2.blocks.0. stages.2.blocks.1. stages.2.blocks.2.
        9 stages.2.blocks.3. stages.2.blocks.4. stages.2.blocks.5.
        8 stages.2.blocks.6. stages.2.blocks.7. stages.2.blocks.8.
        1 stages.3. 0 head.norm. head.fc.
    """
    rates = {
        "stem": 0.023757264,
        "stages.0.*": 0.031676352,
        "stages.1.*": 0.042235136,
        "stages.2.blocks.[012]": 0.056313515,
        "stages.2.blocks.[345]": 0.075084686,
        "stages.2.blocks.[678]": 0.10011292,
        "stages.3.*": 0.75,
    }
    backbone = network("timm/convnext_tiny")
    theirs = {p: POWERS[int(n)] for p, n in spread(official, parameters(backbone)).items()}
    assert multipliers(backbone.layers, layer_decay.table(backbone.layers, rates=rates)) == same(theirs)
