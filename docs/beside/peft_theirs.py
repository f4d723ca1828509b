import torch
from peft import LoraConfig, PeftModel, get_peft_model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(32, 64)
        self.down = torch.nn.Linear(64, 16)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.down(torch.nn.functional.gelu(self.up(x))))


cross_entropy = torch.nn.functional.cross_entropy
net, x, y = Net(), torch.ones(8, 32), torch.zeros(8, dtype=torch.long)
# the lines
config = LoraConfig(
    r=8,
    lora_alpha=16,
    lora_dropout=0.1,
    target_modules=["up", "down"],
    modules_to_save=["head"],
)
model = get_peft_model(net, config)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for _ in range(3):
    cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()

model.save_pretrained("adapter")
restored = PeftModel.from_pretrained(Net(), "adapter")
merged = model.merge_and_unload()
