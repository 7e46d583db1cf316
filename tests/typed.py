"What a user writes, read by a type checker against the installed wheel: scripts/wheel. It is not run."
import torch
from torch import Tensor
from lah_nb import Classifier, DMoE, Swarm, Trainer, load_digits, register_expert, volunteer

@register_expert('double', lambda hidden_dim: torch.zeros(2, hidden_dim))
class Double(torch.nn.Module):
    def __init__(self, hidden_dim: int):
        super().__init__()
        self.linear = torch.nn.Linear(hidden_dim, hidden_dim)
    def forward(self, x: Tensor) -> Tensor: return self.linear(x)

data = load_digits()
with Swarm.local(peers=4, experts='ffn.[0:8].[0:8]', hidden_dim=64) as swarm:
    addrs: list[str] = swarm.addrs
    layer = DMoE(swarm, 64, grid=(8, 8), k=4)
    y: Tensor = layer(torch.zeros(2, 64))
    trainer = Trainer(Classifier([layer], data.features, 64, data.classes), lr=2e-3)
    trainer.fit(data, epochs=3)
    swarm.peers[0].kill()
    alive: bool = swarm.peers[1].alive
    found: dict[str, float] = trainer.evaluate(data)
    snapshot = swarm.snapshot()
    told: dict = snapshot.to_dict()
    swarm.view()
lent = volunteer(addrs, experts=16)
lent.stop()
