"""A Qwen-VL on Megatron Core: what one pipeline stage holds of it.

Shape suffix legend: T = tokens of all packed sequences; V = vocabulary rows of this rank; h = width.
"""

from __future__ import annotations

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vppo.models.attention import PackedSequences, plan_attention
from megatron_vppo.models.deepstack import Deepstack, attach
from megatron_vppo.models.families import weight_map
from megatron_vppo.models.family import Family
from megatron_vppo.models.language import LanguageModel
from megatron_vppo.models.language_map import HEAD
from megatron_vppo.models.packed import PackedBatch
from megatron_vppo.models.transformer_config import HfConfig


class QwenVLModel(MegatronModule):
    """Vision tower (first stage) and the stage's part of the language model.

    There is no output projection: a loss takes the hidden states where it needs them and `head_weight_VD`.
    """

    def __init__(
        self,
        hf_config: HfConfig,
        *,
        family: Family,
        language_config: TransformerConfig,
        vision_config: TransformerConfig,
        stage_layers: tuple[int, ...],
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=language_config)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        stage = groups.pp.rank()
        self.groups = groups
        self.stage_layers = stage_layers
        self.canonical_hf_name = family.canonical_name
        self.weight_map = weight_map(hf_config, family=family)
        self.ignored_hf_names = frozenset({HEAD}) if hf_config.tie_word_embeddings else frozenset()
        self.pre_process = stage == 0
        self.post_process = stage == len(stage_layers) - 1
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        self.vision = (
            family.vision_tower(vision_config, hf_config.vision_config, groups=groups) if self.pre_process else None
        )
        self.language = LanguageModel(
            language_config,
            hf_config.text_config,
            family=family,
            deepstack_layers=family.deepstack_layers(hf_config) if self.pre_process else 0,
            tied=hf_config.tie_word_embeddings,
            layers=stage_layers[stage],
            pre_process=self.pre_process,
            post_process=self.post_process,
            groups=groups,
        )

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T, 1, h]: after the final norm on the last stage, what the next stage continues from otherwise.

        Raises:
            ValueError: image tokens without pixels on the first stage.
        """
        plan = plan_attention(batch.lengths, causal=True, device=batch.token_ids_T.device)
        hidden, deepstack = self._embed(batch) if self.pre_process else (None, None)
        return self.language(hidden, batch.positions_3T, PackedSequences(plan=plan, deepstack=deepstack))

    def _embed(self, batch: PackedBatch) -> tuple[Tensor, Deepstack | None]:
        hidden_T1h = self.language.embed(batch.token_ids_T)
        if batch.image_token_index_I.numel() == 0:
            return hidden_T1h, None
        if batch.pixels_PD is None:
            raise ValueError(
                f"{batch.image_token_index_I.numel()} image tokens but no pixels on the first pipeline stage"
            )
        assert self.vision is not None
        features = self.vision(batch.pixels_PD, batch.grids_thw)
        filling_I1h = features.merged_Mh[batch.image_feature_index_I][:, None, :]
        hidden_T1h = hidden_T1h.index_copy(0, batch.image_token_index_I, filling_I1h)
        added = [feature_Mh[batch.image_feature_index_I] for feature_Mh in features.deepstack_Mh]
        return attach(hidden_T1h, added, batch.image_token_index_I)

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Called by Megatron's schedules with what the previous pipeline stage sent."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.language.decoder.set_input_tensor(received)

    def head_weight_VD(self) -> torch.nn.Parameter:
        """This rank's vocabulary rows of the output weight (the tied embedding's where it is tied); last stage only.

        Rows that pad the vocabulary to a multiple of the tensor-parallel size are zero and lie at the end.
        """
        return self.language.head_weight_VD()

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Called by Megatron where embedding and output weights are tied and lie on two pipeline stages."""
        return self.language.shared_embedding_or_output_weight()
