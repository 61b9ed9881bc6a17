"""Diffusers' own models under integrations.diffusers: who is called, with what, and are the numbers right."""

import copy
import subprocess
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_attn
from compiled_attn import reference
from compiled_attn.integrations import diffusers as integration

pytest.importorskip(
    "diffusers", minversion="0.36", reason="needs diffusers>=0.36: pip install 'compiled_attn[diffusers]'"
)

import diffusers
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_flux, transformer_wan

from compiled_attn.demo import models

NATIVE = ("native", "_native_math", "_native_flash")
DEMO = models.NAMES
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(autouse=True)
def _quiet_and_clean() -> Iterator[None]:
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    diffusers.utils.logging.set_verbosity_error()
    with torch.no_grad():
        yield
    integration.uninstall()
    attention_dispatch._AttentionBackendRegistry.set_active_backend(active)


@pytest.fixture
def ours() -> Iterator[None]:
    with integration.installed():
        yield


class Aten(TorchDispatchMode):
    """Counts the aten operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def kernels(function: Callable[[], Any]) -> dict[str, int]:
    """How often the fused kernel ran, and how often ours in plain math (logsumexp)."""
    with Aten() as mode:
        function()
    return {"flash": mode.calls[FLASH], "math": mode.calls["logsumexp"]}


def tiny(name: str, seed: int = 0) -> models.Subject:
    if name in DEMO:
        return models.build(name, "cpu", torch.float32, real=False, seed=seed)
    torch.manual_seed(seed)
    model, inputs = MORE[name]()
    return models.Subject(name, model.eval(), {**inputs, "return_dict": False}, "tiny")


def _flux2() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 48, 32),
        "img_ids": torch.zeros(1, 16, 4), "txt_ids": torch.zeros(1, 48, 4), "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([4.0]),
    }  # fmt: skip
    return model, inputs


def _hunyuan() -> tuple[nn.Module, dict[str, Any]]:
    # head_dim 10, and always a bool mask
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), image_condition_type=None,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 12, 16), "pooled_projections": torch.randn(1, 8),
        "encoder_attention_mask": torch.arange(12)[None] < 7, "guidance": torch.tensor([1000]),
    }  # fmt: skip
    return model, inputs


def _hunyuan15() -> tuple[nn.Module, dict[str, Any]]:
    # an outer-product mask (1, 1, S, S) with rows that may attend to nothing
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16), "encoder_attention_mask": torch.arange(6)[None] < 4,
        "encoder_hidden_states_2": torch.randn(1, 4, 8), "encoder_attention_mask_2": torch.arange(4)[None] < 3,
        "image_embeds": torch.randn(1, 3, 12),
    }  # fmt: skip
    return model, inputs


def _ltx() -> tuple[nn.Module, dict[str, Any]]:
    # its cross-attention mask is float, (B, H, 1, Sk), -10000 for what is hidden
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, qk_norm="rms_norm_across_heads", caption_channels=16,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 32, 4), "encoder_hidden_states": torch.randn(2, 16, 16),
        "timestep": torch.tensor([500, 500]), "encoder_attention_mask": torch.arange(16) < torch.tensor([[9], [16]]),
        "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip
    return model, inputs


def _z_image() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1,
        n_kv_heads=2, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():
        for pad in (model.x_pad_token, model.cap_pad_token):  # torch.empty until a checkpoint is loaded
            pad.normal_()
    inputs = {
        "x": [torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8)], "t": torch.tensor([0.2, 0.7]),
        "cap_feats": [torch.randn(40, 16), torch.randn(5, 16)],
    }  # fmt: skip
    return model, inputs


MORE: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "flux2": _flux2, "hunyuan": _hunyuan, "hunyuan15": _hunyuan15, "ltx": _ltx, "z_image": _z_image
}  # fmt: skip


def output(subject: models.Subject) -> Tensor:
    out = subject()
    return torch.stack(out) if isinstance(out, list) else out


# ------------------------------------------------------------------------------------------- install and uninstall


def test_install_and_uninstall_restore_identity() -> None:
    theirs, context = attention_dispatch.dispatch_attention_fn, attention_dispatch.attention_backend
    assert transformer_flux.dispatch_attention_fn is theirs
    integration.install()
    here = attention_dispatch.dispatch_attention_fn
    assert here is not theirs
    assert transformer_flux.dispatch_attention_fn is here
    assert transformer_wan.dispatch_attention_fn is here
    integration.install()  # idempotent: ours is not taken for an original
    integration.uninstall()
    assert not integration.is_installed()
    assert attention_dispatch.dispatch_attention_fn is theirs
    assert transformer_flux.dispatch_attention_fn is theirs
    assert transformer_wan.dispatch_attention_fn is theirs
    assert diffusers.models.attention_backend is context
    integration.uninstall()
    assert attention_dispatch.dispatch_attention_fn is theirs


def test_modules_imported_later_and_under_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "diffusers.models.transformers.transformer_chronoedit"
    theirs = attention_dispatch.dispatch_attention_fn
    early = types.ModuleType("a_training_script")
    early.__dict__["renamed"] = theirs
    early.__dict__["direct"] = compiled_attn.dispatch_attention_fn
    monkeypatch.setitem(sys.modules, early.__name__, early)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with integration.installed():
        late = __import__(name, fromlist=["dispatch_attention_fn"])
        here = attention_dispatch.dispatch_attention_fn
        assert late.dispatch_attention_fn is here
        assert early.__dict__["renamed"] is here
    assert late.dispatch_attention_fn is theirs
    assert early.__dict__["renamed"] is theirs
    assert early.__dict__["direct"] is compiled_attn.dispatch_attention_fn


def test_installed_restores_what_was_before() -> None:
    with pytest.raises(KeyError), integration.installed():
        raise KeyError
    assert not integration.is_installed()
    integration.install()
    with integration.installed():
        pass
    assert integration.is_installed()


def test_no_module_of_diffusers_is_left_out() -> None:
    theirs = attention_dispatch.dispatch_attention_fn
    loaded = [module for name, module in sys.modules.items() if name.startswith("diffusers.")]
    holders = [module for module in loaded if module.__dict__.get("dispatch_attention_fn") is theirs]
    assert len(holders) > 5
    with integration.installed():
        left = [module.__name__ for module in holders if module.__dict__["dispatch_attention_fn"] is theirs]
    assert left == []


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "diffusers" or name.startswith("diffusers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"diffusers>=0.36, which is not installed: pip install -U diffusers"):
        integration.install()
    assert not integration.is_installed()
    integration.uninstall()


def test_a_diffusers_without_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "diffusers" or name.startswith("diffusers.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("diffusers", "diffusers.models"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match="it is too old: pip install -U diffusers"):
        integration.install()


def test_install_before_diffusers_is_imported() -> None:
    code = """
import sys
from compiled_attn.integrations import diffusers as integration
assert "diffusers" not in sys.modules
integration.install()
from diffusers.models.transformers import transformer_flux
from diffusers import attention_backend
assert transformer_flux.dispatch_attention_fn is integration._dispatch_attention_fn
assert attention_backend is integration._attention_backend
integration.uninstall()
import diffusers
assert transformer_flux.dispatch_attention_fn is not integration._dispatch_attention_fn
assert diffusers.attention_backend is not integration._attention_backend
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("name", [*DEMO, *MORE])
def test_numbers(name: str, backend: str) -> None:
    subject = tiny(name)
    plain = output(subject)
    with integration.installed(), compiled_attn.attention_backend(backend):
        out = output(subject)
    double = subject.double()
    if name == "z_image":  # takes lists of tensors
        double.inputs |= {key: [one.double() for one in double.inputs[key]] for key in ("x", "cap_feats")}
    right = output(double)  # Diffusers' own path in float64
    yardstick = (plain.double() - right).norm() / right.norm()
    error = (out.double() - right).norm() / right.norm()
    assert float(error) <= 2 * float(yardstick) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", NATIVE)
def test_padding_in_the_middle_is_as_if_it_were_not_there(backend: str, ours: None) -> None:
    """Qwen-Image puts text first: 5 words of 12, then the image."""
    subject = tiny("qwen")
    mask = subject.inputs["encoder_hidden_states_mask"]
    words = int(mask.sum())
    assert 0 < words < mask.shape[1]
    subject.inputs["encoder_hidden_states"][:, words:] = 1e3  # what padding holds must not matter
    short = copy.copy(subject.inputs)
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :words]
    short["encoder_hidden_states_mask"] = None
    with compiled_attn.attention_backend(backend):
        padded = subject()
        alone = subject.model(**short)[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_a_key_padding_mask_is_one_of_keys(ours: None) -> None:
    query, key = torch.randn(2, 7, 2, 16), torch.randn(2, 5, 2, 16)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    out = transformer_flux.dispatch_attention_fn(query, key, key, attn_mask=mask)
    right, _ = reference.attention(query, key, key, key_padding_mask=mask)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)


def test_recorded_calls_name_masks_and_shapes() -> None:
    for installed in (False, True):
        if installed:
            integration.install()
        with integration.recorded() as calls:
            tiny("qwen")()
        assert [(call.query, call.mask) for call in calls] == [((1, 28, 4, 16), "key_padding")]
        with integration.recorded() as calls:
            tiny("wan")()
        assert [(call.query[1], call.key[1], call.query[3]) for call in calls] == [(128, 128, 12), (128, 12, 12)]
        with integration.recorded() as calls:
            tiny("ltx")()
        assert [call.mask for call in calls] == ["none", "float"]


def test_recording_leaves_everything_as_it_was() -> None:
    theirs = transformer_flux.dispatch_attention_fn
    with integration.recorded() as outer, integration.recorded() as inner:
        tiny("flux")()
        with pytest.raises(RuntimeError, match=r"install\(\) was called inside recorded\(\)"):
            integration.install()
    assert len(outer) == len(inner) == 1
    assert transformer_flux.dispatch_attention_fn is theirs
    with integration.installed():
        ours = transformer_flux.dispatch_attention_fn
        with integration.recorded(), pytest.raises(RuntimeError, match=r"uninstall\(\) was called inside"):
            integration.uninstall()
        assert transformer_flux.dispatch_attention_fn is ours
    assert transformer_flux.dispatch_attention_fn is theirs


# --------------------------------------------------------------------------------------- who decides the backend


def test_context_default_and_pin_drive_the_models(ours: None) -> None:
    subject = tiny("wan")  # 4 calls: self and cross, 2 blocks
    assert kernels(subject) == {"flash": 4, "math": 0}
    with compiled_attn.attention_backend("_native_math"):
        assert kernels(subject) == {"flash": 0, "math": 4}
    compiled_attn.set_default_backend("_native_math")
    assert kernels(subject) == {"flash": 0, "math": 4}
    compiled_attn.set_attention_backend(subject.model, "_native_flash")
    assert kernels(subject) == {"flash": 4, "math": 0}
    compiled_attn.set_attention_backend(subject.model.blocks[0].attn2, "_native_math")
    assert kernels(subject) == {"flash": 3, "math": 1}
    compiled_attn.reset_attention_backend(subject.model)
    assert kernels(subject) == {"flash": 0, "math": 4}


def test_without_install_nothing_of_ours_runs() -> None:
    subject = tiny("wan")
    with compiled_attn.attention_backend("_native_math"):
        assert kernels(subject) == {"flash": 4, "math": 0}


def test_pins_survive_a_copy_and_stay_with_their_model(ours: None) -> None:
    first, second = tiny("flux"), tiny("flux", seed=1)
    compiled_attn.set_attention_backend(first.model, "_native_math")
    assert kernels(first) == {"flash": 0, "math": 2}
    assert kernels(second) == {"flash": 2, "math": 0}
    first.model = copy.deepcopy(first.model)
    assert kernels(first) == {"flash": 0, "math": 2}


def test_diffusers_own_setter_is_honoured_and_does_not_leak(ours: None) -> None:
    """Upstream, it flips the backend of the whole process, and reset does not flip it back."""
    first, second = tiny("flux"), tiny("flux", seed=1)
    first.model.set_attention_backend("_native_math")
    assert kernels(first) == {"flash": 0, "math": 2}
    assert kernels(second) == {"flash": 2, "math": 0}
    assert compiled_attn.active_backend() == "native"
    with compiled_attn.attention_backend("_native_flash"):  # what a call names itself wins
        assert kernels(first) == {"flash": 0, "math": 2}
    first.model.reset_attention_backend()
    assert kernels(first) == {"flash": 2, "math": 0}


def test_the_setter_of_one_attention_module(ours: None) -> None:
    subject = tiny("flux")
    subject.model.transformer_blocks[0].attn.set_attention_backend("_native_math")
    assert kernels(subject) == {"flash": 1, "math": 1}


@pytest.mark.parametrize("spelling", ["_native_math", attention_dispatch.AttentionBackendName._NATIVE_MATH])
def test_diffusers_own_context_manager_is_ours(spelling: Any) -> None:
    subject = tiny("flux")
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    with integration.installed(), diffusers.attention_backend(spelling):
        assert compiled_attn.active_backend() == "_native_math"
        assert kernels(subject) == {"flash": 0, "math": 2}
        assert attention_dispatch._AttentionBackendRegistry._active_backend is active
    assert compiled_attn.active_backend() == "native"


def test_two_threads_two_contexts(ours: None) -> None:
    """Upstream the last thread to enter decides for both, and what one leaves behind stays."""
    subjects = [tiny("flux"), tiny("flux", seed=1)]
    barrier, turn, seen = threading.Barrier(2), threading.Lock(), {}

    def work(number: int, backend: str) -> None:
        with torch.no_grad(), compiled_attn.attention_backend(backend):
            barrier.wait()
            # One counts at a time: torch has one flag for all threads that says whether a dispatch mode is active. Left
            # in the order it was entered it stays set, and torch.compile compiles nothing for the rest of the process.
            with turn:
                seen[backend] = kernels(subjects[number])
            barrier.wait()

    threads = [threading.Thread(target=work, args=job) for job in enumerate(("_native_math", "_native_flash"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"_native_math": {"flash": 0, "math": 2}, "_native_flash": {"flash": 2, "math": 0}}
    assert compiled_attn.active_backend() == "native"


# ---------------------------------------------------------------------------------------------- nothing is dropped


def test_what_cannot_be_served_is_refused(ours: None) -> None:
    """Upstream each of these is dropped without a word, or fails as "'NoneType' object is not callable"."""
    call = transformer_flux.dispatch_attention_fn
    x = torch.randn(1, 8, 2, 16)
    with pytest.raises(ValueError, match=r"unknown attention_kwargs \['banana'\]"):
        call(x, x, x, attention_kwargs={"banana": 1})
    with pytest.raises(NotImplementedError, match="has no dropout"):
        call(x, x, x, dropout_p=0.5, backend="_native_flash")
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        call(x, x[:, :, :1], x[:, :, :1])
    with pytest.raises(ValueError, match="no defined meaning"):
        call(x, x, x, torch.ones(1, 1, 8, 8, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="did you mean '_native_math'"):
        call(x, x, x, backend="_native_mth")
    with pytest.raises(NotImplementedError, match="no context parallelism"):
        call(x, x, x, parallel_config=object())


@pytest.mark.parametrize("backend", NATIVE)
def test_what_is_served_is_not_dropped(backend: str, ours: None) -> None:
    call = transformer_flux.dispatch_attention_fn
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    out, lse = call(
        q, k, k, is_causal=True, scale=0.3, enable_gqa=True, backend=backend,
        attention_kwargs={"return_lse": True, "window_size": (3, 0)},
    )  # fmt: skip
    right, right_lse = reference.attention(q, k, k, is_causal=True, scale=0.3, window_size=(3, 0))
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-5, atol=1e-5)
    assert (lse.dtype, lse.shape) == (torch.float32, (2, 4, 9))
