import loralib as lora
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = lora.Linear(32, 64, r=8, lora_alpha=16)
        self.down = lora.Linear(64, 3, r=8, lora_alpha=16)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


net, x = Net(), torch.ones(8, 32)
# the lines
lora.mark_only_lora_as_trainable(net)
optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
for _ in range(3):
    (net(x) ** 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()

torch.save(lora.lora_state_dict(net), "adapter.pt")
net.load_state_dict(torch.load("adapter.pt"), strict=False)
net.eval()  # merges
