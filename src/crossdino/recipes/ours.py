"""Recipes that are not the paper's."""

from __future__ import annotations

from crossdino.config import Config, DataConfig, EvaluationConfig, LossConfig, ModelConfig, TrainingConfig


def compact() -> Config:
    """Cross-DINO for small machines: EfficientNet-Lite0, fewer layers and queries; not from the paper.

    Made for tiles of about 450 pixels without an upright direction (aerial, microscopy): flips and quarter turns.
    """
    return Config(
        name="compact",
        model=ModelConfig(
            backbone="tf_efficientnet_lite0",
            backbone_weights="efficientnet-lite0",
            backbone_frozen_stride=4,
            hidden_dim=128,
            num_encoder_layers=2,
            num_decoder_layers=3,
            feedforward_dim=512,
            num_queries=200,
            fusion="cctm",
            fusion_hidden_dim=256,
        ),
        # Boost weighs a 45-pixel object of a 448-pixel image about a tenth of what the focal loss does; from a few
        # hundred objects its positives then learn too slowly. At alpha 0.6 and weight 2 the balance is the focal one's.
        loss=LossConfig(classification="boost", beta=0.1, alpha=0.6, class_weight=2.0),
        data=DataConfig(
            train_short_sides=(448,),
            train_long_side=640,
            crop_short_sides=(384, 448, 512, 576, 640, 704),
            crop_range=(448, 448),
            test_short_side=448,
            test_long_side=640,
            vertical_flip=0.5,
            quarter_turns=True,
            color_jitter=0.3,
        ),
        evaluation=EvaluationConfig(num_select=200),
        training=TrainingConfig(
            epochs=72,
            batch_size=2,
            learning_rate=4e-4,
            backbone_learning_rate=2e-4,
            drop_epochs=(58,),
            warmup_steps=100,
            precision="bf16",
            ema_decay=0.998,
            evaluate_every=10,
        ),
    )
