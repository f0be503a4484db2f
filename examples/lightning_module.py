"""A Skip LSTM in Lightning, in mixed precision: python examples/lightning_module.py."""

import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from skiprnn import SkipLSTM


class Digits(lightning.LightningModule):
    def __init__(self, cost: float = 2e-3):
        super().__init__()
        self.rnn, self.readout, self.cost = SkipLSTM(4, 32, batch_first=True), nn.Linear(32, 10), cost

    def training_step(self, batch, _):
        pixels, digit = batch  # (batch, 16 steps, 4 pixels)
        _, (h, _), updates = self.rnn(pixels)
        logits = self.readout(h[-1])
        self.log("accuracy", (logits.argmax(1) == digit).float().mean(), prog_bar=True, on_step=False, on_epoch=True)
        self.log("state_updates", updates.sum(1).mean(), prog_bar=True, on_step=False, on_epoch=True)
        return functional.cross_entropy(logits, digit) + self.cost * updates.sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


if __name__ == "__main__":
    pixels, digits = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.tensor(pixels / 16).float().view(-1, 16, 4), torch.tensor(digits))
    quiet = {"logger": False, "enable_checkpointing": False}  # nothing is written
    trainer = lightning.Trainer(max_epochs=6, accelerator="cpu", precision="bf16-mixed", **quiet)
    trainer.fit(Digits(), torch.utils.data.DataLoader(data, 64, shuffle=True))
    print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
