"""A Qwen-VL on Megatron Core: the part that one pipeline stage holds.

Shape suffix legend: K = all packed tokens; C = those of this context-parallel rank (all, without context parallelism);
S = those of C that this rank holds between layers (all, without sequence parallelism); I = image tokens among K; J =
image tokens among C; W = image tokens among S; M = merged vision features; P = patches of this rank's images; D =
values of one patch; V = vocabulary rows of this rank; h = hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vppo.models.families import hf_copies, weight_map
from megatron_vppo.models.family import Family
from megatron_vppo.models.hf_config import HfConfig
from megatron_vppo.models.language.deepstack import prepare_deepstack
from megatron_vppo.models.language.model import LanguageModel
from megatron_vppo.models.layers.context_parallel import tokens_of_rank
from megatron_vppo.models.layers.packed import PackedBatch
from megatron_vppo.models.layers.parts import LayerParts
from megatron_vppo.models.layers.sequences import Deepstack, PackedSequences
from megatron_vppo.models.stage_input import StageInput, image_tokens_of_rank
from megatron_vppo.models.vision.image_parallel import (
    ImageWork,
    VisionGroups,
    image_parallel_features,
    plan_images,
    split_pixels,
)
from megatron_vppo.models.vision.tower import VisionFeatures, join_features
from megatron_vppo.weights.entries import Entry, stage_entries
from megatron_vppo.weights.padding import without_padding


class QwenVLModel(MegatronModule):
    """The vision tower (on the first stage) and the stage's part of the language model.

    There is no output projection: a loss multiplies the hidden states that it needs by `head_weight_Vh`.
    """

    def __init__(
        self,
        hf_config: HfConfig,
        *,
        family: Family,
        parts: LayerParts,
        language_config: TransformerConfig,
        vision_config: TransformerConfig,
        stage_layers: tuple[int, ...],
        virtual_stage: int,
        groups: ProcessGroupCollection,
        vision_groups: VisionGroups,
    ) -> None:
        super().__init__(config=language_config)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        self.vp_stage = virtual_stage  # Megatron's name
        self.stage = virtual_stage * groups.pp.size() + groups.pp.rank()
        self.groups = groups
        self.vision_groups = vision_groups
        self.stage_layers = stage_layers
        self.to_released_name = family.to_released_name  # a function: name in a file -> name in the released checkpoint
        self.parts = parts
        self.weight_map = parts.rename_entries(weight_map(hf_config, family=family))
        self.hf_copies = hf_copies(self.weight_map)
        self.pre_process = self.stage == 0
        self.post_process = self.stage == len(stage_layers) - 1
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings
        self.vision = (
            family.vision_tower(vision_config, hf_config.vision_config, parts=parts, groups=vision_groups.tower)
            if self.pre_process
            else None
        )
        self.language = LanguageModel(
            language_config,
            hf_config.text_config,
            family=family,
            parts=parts,
            deepstack_layers=family.deepstack_layers(hf_config) if self.pre_process else 0,
            tied=hf_config.tie_word_embeddings,
            layers=stage_layers[self.stage],
            virtual_stage=virtual_stage if len(stage_layers) > groups.pp.size() else None,
            pre_process=self.pre_process,
            post_process=self.post_process,
            groups=groups,
        )

    def tensor_group(self, entry: Entry) -> dist.ProcessGroup:
        """Returns the ranks that a parameter is split over."""
        return self.groups.tp if entry.part == "language_model" else self.vision_groups.tower.tp

    def plan(self, batch: PackedBatch) -> StageInput:
        """Works out on the host what `forward` reads of a micro-batch. Reads no weight, so any thread may call it.

        The stages of a rank read the same; ask the first of them.
        """
        context, shared_by = self.groups.cp, self.vision_groups.images
        own_C = tokens_of_rank(batch.packing, rank=context.rank(), size=context.size())
        sequence_group = self.groups.tp if self.config.sequence_parallel else None
        image_tokens = None
        images: tuple[ImageWork, ...] = ()
        if self.vision is not None and batch.image_token_index_I.numel():
            image_tokens = image_tokens_of_rank(
                batch,
                own_C,
                sequence_rank=0 if sequence_group is None else sequence_group.rank(),
                sequence_ranks=1 if sequence_group is None else sequence_group.size(),
            )
            ranks = {"rank": shared_by.rank(), "ranks": shared_by.size()}
            images = tuple(plan_images(self.vision, run, **ranks) for run in batch.runs)
        return StageInput(
            token_ids_C=batch.token_ids_K[own_C],
            positions_3C=batch.positions_3K[:, own_C],
            plan=self.parts.plan(batch.packing, causal=True, rank=context.rank(), size=context.size()),
            image_tokens=image_tokens,
            images=images,
            earlier=() if image_tokens is None else batch.earlier,
        )

    def forward(self, batch: StageInput, pixels_PD: Tensor | None = None) -> Tensor:
        """Returns hidden states: after the final norm on the last stage [C, 1, h], else for the next stage [S, 1, h].

        Args:
            pixels_PD: float; the patches of this rank's images, which the first stage reads.

        Raises:
            ValueError: image tokens without pixels on the first stage.
        """
        hidden, deepstack = self._embed(batch, pixels_PD) if self.pre_process else (None, None)
        hidden = self.language(hidden, batch.positions_3C, PackedSequences(plan=batch.plan, deepstack=deepstack))
        if self.post_process and self.config.sequence_parallel:
            # The vocabulary head has already summed its gradient over the ranks. So the backward pass of this gather
            # only cuts out each rank's tokens, and does not sum again.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        return hidden

    def _embed(self, batch: StageInput, pixels_PD: Tensor | None) -> tuple[Tensor, Deepstack | None]:
        """Embeds this rank's tokens, [S, 1, h], puts the images in, and prepares deepstack's features."""
        tokens, deepstack_Jh = batch.image_tokens, []
        # The backward pass takes what was made last first. So the gradient of the embedding, a large one, is complete
        # before the tower begins, and is reduced meanwhile.
        features = None if tokens is None else self._features(batch, pixels_PD)
        hidden_C1h = self.language.embed(batch.token_ids_C)
        if tokens is not None and features is not None:
            # As embeddings, whose backward pass sums repeated rows in the same order every time (see ResponseTokens).
            hidden_C1h = hidden_C1h.index_copy(
                0, tokens.index_J, F.embedding(tokens.feature_J, features.merged_Mh)[:, None, :]
            )
            deepstack_Jh = [F.embedding(tokens.feature_J, feature_Mh) for feature_Mh in features.deepstack_Mh]
        sequence_group = self.groups.tp if self.config.sequence_parallel else None
        hidden_S1h = hidden_C1h
        if sequence_group is not None:
            hidden_S1h = scatter_to_sequence_parallel_region(hidden_C1h, group=sequence_group)
        if torch.is_grad_enabled() and not hidden_S1h.requires_grad:
            # Embedding and tower are frozen, but Megatron's schedules and recomputation want a gradient of the input.
            hidden_S1h.requires_grad_()
        if tokens is None or not deepstack_Jh:
            return hidden_S1h, None
        return prepare_deepstack(
            hidden_S1h,
            deepstack_Jh,
            held=tokens.held,
            image_token_index_W=tokens.index_W,
            sequence_group=sequence_group,
        )

    def _features(self, batch: StageInput, pixels_PD: Tensor | None) -> VisionFeatures:
        """Reads the features of earlier runs of the tower, and runs it on the images that are new."""
        assert self.vision is not None and batch.image_tokens is not None
        if pixels_PD is None:
            raise ValueError(
                f"{len(batch.image_tokens.index_J)} image tokens but no pixels on the first pipeline stage"
            )
        found = [kept.read() for kept in batch.earlier]
        for work, own_PD in zip(batch.images, split_pixels(batch.images, pixels_PD), strict=True):
            features = image_parallel_features(
                self.vision, work, own_PD, groups=self.vision_groups, width=self.config.hidden_size
            )
            if work.kept is not None:
                work.kept.put(features)
                features = work.kept.read()
            found.append(features)
        return join_features(found)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().sharded_state_dict(*args, **kwargs)
        for entry in stage_entries(self.weight_map, stage_layers=self.stage_layers, stage=self.stage):
            if padding := entry.kind.padding(self.tensor_group(entry).size()):
                name, dim = entry.local_name(self.stage_layers), entry.kind.partition_dim
                assert dim is not None
                state[name] = without_padding(state[name], dim=dim, padding=padding)
        if self.vision_groups.tower.tp.size() != self.groups.tp.size():
            for key, item in state.items():
                # The tower was built for one tensor-parallel rank, and every rank has a whole copy of it. The replica
                # id tells Megatron which of the copies to write.
                if key.startswith("vision."):
                    first, _, last = item.replica_id
                    item.replica_id = (first, self.groups.tp.rank(), last)
        return state

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Takes what the previous pipeline stage sent; Megatron's schedules call it."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.language.decoder.set_input_tensor(received)

    def head_weight_Vh(self) -> torch.nn.Parameter:
        """Returns this rank's vocabulary rows of the output weight, or of the embedding it is tied to; last stage only.

        Rows that pad the vocabulary to a multiple of the tensor-parallel size are zero and come last.
        """
        return self.language.head_weight_Vh()

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Returns the tied weight where embedding and output weight lie on two pipeline stages; Megatron calls it."""
        return self.language.shared_embedding_or_output_weight()
