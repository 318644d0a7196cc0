import torch
from peft import PeftModel
from torch.testing import assert_close

from acetate.formats.pipeline import PEFTAdapter
from acetate.models.adapters import trainable_state
from acetate.models.dit import add_dora, merge_dora, velocity


def test_peft_loads_the_adapter_of_a_merged_transformer(make_transformer, tmp_path):
    ours = make_transformer()
    add_dora(ours, 2, 4)
    torch.manual_seed(0)
    for parameter in trainable_state(ours).values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter = PEFTAdapter(ours)
    merge_dora(ours)
    adapter.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(make_transformer(), str(tmp_path / "adapter"))
    assert theirs.peft_config["default"].use_dora
    x, t, context = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 16)
    with torch.no_grad():
        expected = velocity(ours, x, t, context)
        assert_close(theirs(x, t, context, return_dict=False)[0], expected, rtol=0, atol=1e-5)
        assert (velocity(make_transformer(), x, t, context) - expected).abs().max() > 1e-2
