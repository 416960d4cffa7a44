"""RNA design: sequences that bind given RNAs, or that fold into a given structure, with ViennaRNA as the judge (extra
`rna`).
"""

from headwater.sequences.data import FastaError, Record, landscape, mirna_targets, read_fasta, write_fasta
from headwater.sequences.diversity import distinct, edit_distances, mean_pairwise_distance
from headwater.sequences.environment import InverseFolding, pair_table
from headwater.sequences.reward import BindingReward, InverseFoldingReward

__all__ = [
    "BindingReward",
    "FastaError",
    "InverseFolding",
    "InverseFoldingReward",
    "Record",
    "distinct",
    "edit_distances",
    "landscape",
    "mean_pairwise_distance",
    "mirna_targets",
    "pair_table",
    "read_fasta",
    "write_fasta",
]
