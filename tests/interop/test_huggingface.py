"""Weights in Hugging Face's layout are read exactly, and anything but GPT-2 is rejected."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.errors import UserError
from rekindle.interop.huggingface import HUB, from_pretrained
from rekindle.model.gpt2 import GPT2


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("buffers", [False, True], ids=["plain", "buffers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_weight_arrives_where_it_belongs(
    folder: Callable[..., Path], model: GPT2, prefix: str, buffers: bool, dtype: torch.dtype
) -> None:
    read = from_pretrained(folder(prefix=prefix, buffers=buffers, dtype=dtype))
    assert read.config == model.config
    expected = dict(model.named_parameters())
    assert dict(read.named_parameters()).keys() == expected.keys()
    for name, p in read.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, expected[name].to(dtype).float()), name


def test_model_that_was_read_can_be_trained(folder: Callable[..., Path], model: GPT2) -> None:
    read = from_pretrained(folder())
    assert isinstance(read, GPT2)
    assert read.lm_head.weight is read.transformer.wte.weight
    for p in read.parameters():
        assert p.dtype == torch.float32
        assert p.device.type == "cpu"
        assert p.is_contiguous()
    idx = torch.arange(20).view(2, 10)
    for m in (read, model):
        m.zero_grad()
        _, loss = m(idx, idx)
        loss.backward()
    for (name, p), q in zip(read.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad), name


def test_file_may_also_contain_the_head(folder: Callable[..., Path], model: GPT2) -> None:
    head = model.lm_head.weight.detach().clone()
    path = folder(prefix="transformer.", tensors={"lm_head.weight": head})
    assert torch.equal(from_pretrained(str(path)).lm_head.weight, head)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_inner": 64}, "n_inner is 64"),
        ({"n_layer": None}, "n_layer is missing"),
        ({"n_embd": "32"}, "n_embd is missing or not a positive integer"),
        ({"n_layer": 0}, "n_layer is missing or not a positive integer"),
        ({"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        ({"vocab_size": 100}, "wte.weight has shape"),
        ({"n_layer": 3}, r"transformer\.h\.2\..* is missing or unknown"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, but there are only 28 tensors"),
        ({"n_layer": 1}, r"transformer\.h\.1\..* is missing or unknown"),
    ],
)
def test_config_of_another_model_is_rejected(
    folder: Callable[..., Path], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        from_pretrained(folder(config))
    assert "\n" not in str(caught.value)


def test_explicit_inner_width_of_gpt2_is_accepted(folder: Callable[..., Path]) -> None:
    assert from_pretrained(folder({"n_inner": 128})).config.n_embd == 32


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"h.1.ln_2.bias": None}, r"transformer\.h\.1\.ln_2\.bias is missing or unknown"),
        ({"wte.weight": None}, r"transformer\.wte\.weight is missing or unknown"),
        ({"h.0.attn.rotary": torch.zeros(3)}, r"h\.0\.attn\.rotary is missing or unknown"),
        ({"wpe.weight": torch.zeros(63, 32)}, r"wpe\.weight has shape \(63, 32\), not \(64, 32\)"),
        # A linear weight that is already in our layout, which must not be transposed.
        ({"h.0.mlp.c_fc.weight": torch.zeros(128, 32)}, r"c_fc\.weight has shape"),
    ],
)
def test_other_tensors_are_rejected(
    folder: Callable[..., Path], tensors: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        from_pretrained(folder(tensors=tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["", "{", "[1, 2]", '"gpt2"', "null"])
def test_config_that_is_not_a_json_object_is_rejected(
    folder: Callable[..., Path], config: str
) -> None:
    path = folder()
    (path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        from_pretrained(path)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_rejected(folder: Callable[..., Path]) -> None:
    path = folder()
    weights = path / "model.safetensors"
    for keep in (weights.stat().st_size - 1, 100, 4, 0):
        with open(weights, "r+b") as file:
            file.truncate(keep)
        with pytest.raises(UserError, match="not a complete safetensors file") as caught:
            from_pretrained(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_without_one_of_the_files_is_rejected(
    folder: Callable[..., Path], missing: str
) -> None:
    path = folder()
    (path / missing).rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"has no {missing}"):
        from_pretrained(path)


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[dict[str, Path]], None]]:
    """`hub({"/path": file})`: serve these files from a local server that has no others."""
    import huggingface_hub.constants as constants

    files: dict[str, Path] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._respond(body=False)

        def do_GET(self) -> None:
            self._respond(body=True)

        def _respond(self, body: bool) -> None:
            file = files.get(self.path)
            content = file.read_bytes() if file else b""
            self.send_response(200 if file else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{len(content):x}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield files.update
    server.shutdown()
    thread.join()
    server.server_close()


def test_hub_model_is_downloaded_once(
    hub: Callable[[dict[str, Path]], None], folder: Callable[..., Path], model: GPT2,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = folder()
    names = ("config.json", "model.safetensors")
    hub({f"/{HUB['gpt2']}/resolve/main/{name}": path / name for name in names})
    read = from_pretrained("gpt2")
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    assert torch.equal(from_pretrained("gpt2").lm_head.weight, model.lm_head.weight)


def test_missing_file_on_the_hub_is_named_with_advice(
    hub: Callable[[dict[str, Path]], None],
) -> None:
    with pytest.raises(
        UserError,
        match=r"config\.json of openai-community/gpt2-xl .*give a folder with",
    ) as caught:
        from_pretrained("gpt2-xl")
    assert "\n" not in str(caught.value)


def test_folder_takes_precedence_over_a_hub_model(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model: GPT2
) -> None:
    path = folder()
    path.rename(path.with_name("gpt2"))
    monkeypatch.chdir(path.parent)
    assert from_pretrained("gpt2").config == model.config
