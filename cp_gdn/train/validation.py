"""Validation loss on packs that never change, in nats a token and in bits per byte beside the unigram baseline."""

from typing import Any

import torch

from cp_gdn import comm
from cp_gdn.train.batch import place
from cp_gdn.train.callbacks import Callback, Record
from cp_gdn.train.data import Corpus, unigram_bits_per_byte, validation_packs
from cp_gdn.train.topology import Topology


def evaluate(
    engine: Any, corpus: Corpus, topology: Topology, *, seq_len: int, packs: int, exchange: str
) -> float:
    """Mean loss in nats over the first ``packs`` packs a dp rank; collective, the same on every rank."""
    total = torch.zeros(2, device=topology.device)
    shared_out = validation_packs(
        corpus.val,
        seq_len,
        packs * topology.dp_size,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
    )
    engine.eval()
    with torch.no_grad():
        for pack in shared_out:
            batch = place(pack, topology, exchange)
            loss_sum, _ = engine(batch.input_ids, batch.labels, batch.context)
            total += torch.stack((loss_sum.float(), batch.num_valid))
    engine.train()
    loss_sum, valid = comm.all_reduce_sum(total).tolist()
    return loss_sum / max(valid, 1.0)


class Validation(Callback):
    """Adds val/ to the records of the steps at which it is due."""

    def on_start(self, trainer) -> None:
        self._unigram = unigram_bits_per_byte(trainer.corpus)

    def on_record(self, trainer, record: Record) -> None:
        config = trainer.config
        if not trainer.validates_at(trainer.step):
            return
        loss = evaluate(
            trainer.engine,
            trainer.corpus,
            trainer.topology,
            seq_len=config.data.seq_len,
            packs=config.validation.packs,
            exchange=config.cp.exchange,
        )
        record["val/loss"] = loss
        record["val/bits_per_byte"] = trainer.corpus.bits_per_byte(loss)
        record["val/unigram_bits_per_byte"] = self._unigram
        trainer.pause()
