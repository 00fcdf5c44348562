"""What the user chooses about data: a plain dataclass, so that it serves as a schema too."""

from dataclasses import dataclass

KINDS = ("stdlib", "text")


@dataclass
class DataConfig:
    """Which text to train on and how it is tokenised, split and packed.

    Attributes:
        kind: "stdlib" (the running interpreter's own library sources) or "text" (``path``).
        path: for "text": a file or a folder, searched recursively; None for "stdlib".
        tokenizer: "bytes" (or None), or the path of a tokenizer.json or of a folder holding one.
        seq_len: tokens in a pack.
        cache_dir: folder for the tokenised corpus; created when missing.
        val_fraction: share of the documents that is held out, between 0 and 1.
        seed: order of the training documents; the split does not depend on it.
        text_key: the field of a jsonl line, or the column of a parquet file, that holds the text.

    Raises ValueError for an unknown kind, a path where there must be none or none where there must
    be one, seq_len < 2, a negative seed, and a val_fraction that leaves one of the two parts empty.
    """

    kind: str = "stdlib"
    path: str | None = None
    tokenizer: str | None = "bytes"
    seq_len: int = 4096
    cache_dir: str = "data/cache"
    val_fraction: float = 0.05
    seed: int = 0
    text_key: str = "text"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"data kind is {self.kind!r} but must be one of {', '.join(KINDS)}; use kind=text "
                "with a path for files of your own"
            )
        if self.kind == "text" and not self.path:
            raise ValueError("data kind is 'text' but path is not set; set it to a file or folder")
        if self.kind == "stdlib" and self.path:
            raise ValueError(
                f"data path is {self.path!r} but kind 'stdlib' reads the interpreter's own "
                "sources; use kind=text to read the path, or leave it out"
            )
        if self.seq_len < 2:
            raise ValueError(
                f"seq_len is {self.seq_len} but a training sample needs at least 2 tokens; raise it"
            )
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(
                f"val_fraction is {self.val_fraction} but must lie strictly between 0 and 1, since "
                "neither part may be empty; 0.05 is usual"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed} but must not be negative; choose another")
