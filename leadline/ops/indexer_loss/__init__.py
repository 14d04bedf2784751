"""The indexer's training signal, and how well its picks cover the attention they stand for.

The top-k is not differentiable, so the language-model loss never reaches the indexer. It learns instead to predict the
attention of the main heads: a KL divergence from the attention mass of the entries to the softmax of the index scores.

The target is the *conditional* of the joint softmax. Attention normalises over window keys, entries and the sink
together; the mass a head gives to entry c is p_hc of that joint softmax. Summed over heads and divided by the total
mass of the entries, it is the distribution the indexer should have. (A softmax renormalised per head over the entries
alone would give a head that looks only at its window the same vote as a head that lives on the entries.)
"""

from __future__ import annotations

from torch import Tensor

from leadline.ops.dispatch import use_kernel
from leadline.ops.indexer_loss.reference import IndexerLoss, recall_reference
from leadline.ops.reach import Reach


def indexer_loss(
    index_q_TJI: Tensor,
    index_weight_TJ: Tensor,
    index_keys_CI: Tensor,
    q_THK: Tensor,
    entries_CK: Tensor,
    lse_TH: Tensor,
    reach: Reach,
    picked_TM: Tensor | None,
) -> Tensor:
    """kl_t = KL(target_t || softmax_c(score(t, c))) in nats, FP32 [T]; 0 for a query that sees no entry.

    target_t(c) = sum_h p_thc / sum_c sum_h p_thc with p_thc = exp(q_th . entry_c / sqrt(K) - lse_th), both softmaxes
    over picked_TM, or over all visible entries when it is None (the dense warm-up).

    index_*: what the indexer scores with, differentiable. q_THK, entries_CK, lse_TH: the attention that is imitated, as
    given to and returned by `sparse_attention`; no gradient flows into them. Linear in memory, forward and backward.
    """
    if use_kernel("indexer_loss", index_q_TJI):
        from leadline.ops.indexer_loss import kernel

        assert reach.first_entry_T is not None
        assert reach.visible_T is not None
        assert reach.most_visible is not None
        seen = reach.first_entry_T, reach.visible_T, reach.most_visible, len(reach.lengths)
        index = index_q_TJI, index_weight_TJ, index_keys_CI
        return kernel.IndexerLossKernel.apply(*index, q_THK, entries_CK, lse_TH, *seen, picked_TM)
    return IndexerLoss.apply(index_q_TJI, index_weight_TJ, index_keys_CI, q_THK, entries_CK, lse_TH, reach, picked_TM)


def indexer_recall(
    q_THK: Tensor, entries_CK: Tensor, lse_TH: Tensor, reach: Reach, picked_TM: Tensor, dense: bool, queries: Tensor
) -> Tensor:
    """Share of the true attention mass of the entries that the picks keep, for the query rows `queries`, FP32.

    "True" is the attention that would see every visible entry. lse_TH is what `sparse_attention` returned, which saw
    all visible entries (dense=True) or the picked ones; in the second case the missing mass is added to the
    denominator. Queries for which every visible entry is picked are left out (their recall is 1 by construction); the
    result may be empty. Runs as the reference everywhere, and waits once for the device.
    """
    return recall_reference(q_THK, entries_CK, lse_TH, reach, picked_TM, dense, queries)
