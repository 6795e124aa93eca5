"""Language model: token embedding, transformer layers with grouped queries and M-RoPE, output weights.

Shape suffix legend: C = tokens of this context-parallel rank; S = tokens that this rank holds between layers; V =
vocabulary rows of this rank; h = hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vppo.models.family import Family
from megatron_vppo.models.language.deepstack import DeepstackLayer
from megatron_vppo.models.layers.parts import LayerParts, for_plain_linear, layer_spec
from megatron_vppo.models.layers.sequences import PackedSequences
from megatron_vppo.weights.kinds import padded_vocabulary


class LanguageModel(LanguageModule):
    """The part of the language model that one pipeline stage holds."""

    def __init__(
        self,
        config: TransformerConfig,
        hf_config: Any,
        *,
        family: Family,
        parts: LayerParts,
        deepstack_layers: int,
        tied: bool,
        layers: int,
        virtual_stage: int | None,
        pre_process: bool,
        post_process: bool,
        groups: ProcessGroupCollection,
    ) -> None:
        """
        Args:
            hf_config: the text configuration.
            deepstack_layers: how many of this stage's first layers add vision features.
            virtual_stage: which of this rank's stages it is; None: it has one.
            pre_process: True on the first stage, which holds the embedding.
            post_process: True on the last stage, which holds the final norm and the output weight.
        """
        super().__init__(config, pg_collection=groups)
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = tied
        vocabulary = padded_vocabulary(hf_config.vocab_size, groups.tp.size())
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=vocabulary,
                max_sequence_length=hf_config.max_position_embeddings,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=False,  # image features come in first
                tp_group=groups.tp,
            )
        pad = hf_config.pad_token_id
        self.padding_token = None if pad is None else pad % hf_config.vocab_size  # -1 is the last one, as in torch
        self.rope = family.rotary(hf_config)
        self.decoder = TransformerBlock(
            config,
            _layer_specs(family, parts, layers=layers, deepstack_layers=deepstack_layers),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=virtual_stage,
        )
        if post_process and not (tied and pre_process):
            self.output_layer = _output_layer(config, vocabulary, groups)
        self._mark_output_weights()

    def _mark_output_weights(self) -> None:
        """Sets the marks that Megatron's `setup_embeddings_and_output_layer` sets, without its all-reduce of weights
        that are not loaded yet.

        `shared` keeps the second holder of a tied weight out of gradient norms.
        """
        tied_apart = self.share_embeddings_and_output_weights and self.pre_process != self.post_process
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        if self.post_process:
            self.head_weight_Vh().is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        if tied_apart and (self.pre_process or self.post_process):
            weight = self.shared_embedding_or_output_weight()
            weight.shared_embedding = True  # type: ignore[attr-defined]
            if self.post_process:
                weight.shared = True  # type: ignore[attr-defined]

    def head_weight_Vh(self) -> torch.nn.Parameter:
        """Returns this rank's rows of the output weight.

        Raises:
            RuntimeError: on another than the last pipeline stage.
        """
        if not self.post_process:
            raise RuntimeError("only the last pipeline stage holds the output weight")
        if self.share_embeddings_and_output_weights and self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight

    def embed(self, token_ids_C: Tensor) -> Tensor:
        """Returns [C, 1, h].

        The row of the padding token gets no gradient from here, as with `padding_idx` of the embedding in transformers.
        A tied output layer gives it one all the same.
        """
        hidden_C1h = self.embedding(input_ids=token_ids_C[None, :], position_ids=None)
        if self.padding_token is None:
            return hidden_C1h
        is_padding_C11 = (token_ids_C == self.padding_token)[:, None, None]
        return torch.where(is_padding_C11, hidden_C1h.detach(), hidden_C1h)

    def forward(self, hidden_S1h: Tensor | None, positions_3C: Tensor, sequences: PackedSequences) -> Tensor:
        """Runs this stage's layers on the embeddings, or on what the previous stage sent; [S, 1, h]."""
        return self.decoder(
            hidden_states=hidden_S1h,
            attention_mask=None,
            rotary_pos_emb=self.rope(positions_3C),
            packed_seq_params=sequences,
        )


def _output_layer(config: TransformerConfig, vocabulary: int, groups: ProcessGroupCollection) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        config.hidden_size,
        vocabulary,
        config=for_plain_linear(config),
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        tp_group=groups.tp,
    )


def _layer_specs(
    family: Family, parts: LayerParts, *, layers: int, deepstack_layers: int
) -> TransformerBlockSubmodules:
    """Makes the specs of one stage's layers; the first ones add deepstack features."""
    classes = [DeepstackLayer if layer < deepstack_layers else TransformerLayer for layer in range(layers)]
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(parts, causal=True, qk_norm=family.qk_norm, layer=layer) for layer in classes],
        layer_norm=parts.norm,
    )
