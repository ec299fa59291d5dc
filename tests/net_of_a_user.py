"""A project of a user, as text, and the configuration that names it."""

NET = """
import lightning.pytorch as pl
import torch
from torch import nn

class Net(pl.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x))

    def step(self, batch, name):
        loss = (self(batch) - batch[:, :4]).square().mean()
        self.log(name, loss)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train_loss")

    def validation_step(self, batch, batch_idx):
        return self.step(batch, "val_loss")

    def test_step(self, batch, batch_idx):
        return self.step(batch, "test_loss")

    def predict_step(self, batch, batch_idx):
        print("predicted", (self(batch) - batch[:, :4]).square().mean().item())

    def train_dataloader(self):
        data = torch.randn(32, 8, generator=torch.Generator().manual_seed(7))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.linspace(-1, 1, 64).view(8, 8), batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
"""
BASE = {
    "seed_everything": 0,
    "model": "net_of_a_user.Net",
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": "out",
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "out", "name": "run"}},
    },
}
