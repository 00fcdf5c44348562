"""Text to packs: find documents, tokenise them once into a memory map, cut them into packs.

    sources      files -> documents (bytes)
    tokenizer    documents -> token ids
    writing      token ids -> files to be memory-mapped
    cache        once for all processes, whole or not at all
    corpus       the memory map -> a train and a validation store
    packs        store -> packs of seq_len tokens, a pure function of (seed, epoch, sample)

Nothing here knows of process groups: ranks meet at a file lock, and a loader is told its dp_rank
and dp_size.
"""

from cp_gdn.train.data.config import DataConfig
from cp_gdn.train.data.corpus import Corpus, TokenStore, build_corpus, unigram_bits_per_byte
from cp_gdn.train.data.packs import IGNORE_INDEX, Pack, PackLoader, validation_packs

__all__ = [
    "IGNORE_INDEX",
    "Corpus",
    "DataConfig",
    "Pack",
    "PackLoader",
    "TokenStore",
    "build_corpus",
    "unigram_bits_per_byte",
    "validation_packs",
]
