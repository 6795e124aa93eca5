"""The base of every core attention: Megatron's signature on the outside, packed sequences and a plan on the inside.

Shape suffix legend: C = tokens of this context-parallel rank (patches, in a vision tower); H = attention heads of this
rank; E = values per attention head.
"""

from __future__ import annotations

from torch import Tensor

from megatron_vppo.models.layers.sequences import AttentionPlan, PackedSequences


class PackedCoreAttention:
    """Takes what Megatron's attention layer passes to its `core_attention`, and calls `attend`.

    Put it before the torch module among the bases, so that this `forward` is the module's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSequences,
        **of_megatron: object,
    ) -> Tensor:
        """Attends within each packed sequence. The plan says which tokens see each other, so masks are not read.

        Args:
            query: [C, 1, H, E].
            key, value: [C, 1, H or fewer, E].
            of_megatron: `attn_mask_type` and `attention_bias`.

        Returns:
            [C, 1, H*E].
        """
        plan = self.select_plan(packed_seq_params)
        output = self.attend(query.squeeze(1), key.squeeze(1), value.squeeze(1), plan)
        return output.flatten(1).unsqueeze(1)

    def attend(self, query_CHE: Tensor, key_CHE: Tensor, value_CHE: Tensor, plan: AttentionPlan | None) -> Tensor:
        """Attends by the plan; returns [C, H*E] or [C, H, E]."""
        raise NotImplementedError

    def select_plan(self, sequences: PackedSequences) -> AttentionPlan | None:
        return sequences.plan


class InWindows:
    """Makes a core attention read the plan of windows; put it first among the bases."""

    def select_plan(self, sequences: PackedSequences) -> AttentionPlan | None:
        return sequences.window_plan
