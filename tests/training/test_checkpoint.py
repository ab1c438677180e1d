import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaopt.errors import UserError
from metaopt.training.checkpoint import Checkpoints
from metaopt.training.fingerprint import Fingerprint
from metaopt.training.manifest import MANIFEST
from metaopt.types import MetaState

CONFIG = {"seed": 0, "outer": {"learning_rate": 0.1, "betas": (0.9, 0.99)}}
FINGERPRINT = Fingerprint(CONFIG, {"first tasks": "a"}, {"estimate": "b"}, {"num_devices": 2})


def make_state(step: int, impl: str | None = None, width: int = 3) -> MetaState:
    params = {
        "w": jnp.linspace(-1.0, 1.0, 2 * width).reshape(2, width) * (step + 1) / 7,
        "half": jnp.full(5, step / 3, jnp.bfloat16),
    }
    return MetaState(
        step=jnp.int32(step),
        meta_params={"params": params, "rates": jnp.zeros((0, 4))},
        opt_state=optax.chain(optax.clip(1.0), optax.adam(0.1)).init(params),
        hparams={"inner_learning_rate": jnp.float32(0.1)},
        key=jax.random.key(step, impl=impl),
    )


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def open_checkpoints(directory, fingerprint=None, keep_last=3):
    return Checkpoints(directory, fingerprint=fingerprint or FINGERPRINT, keep_last=keep_last)


def save(directory, *steps, notes=None, **options):
    with open_checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), notes=notes)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_round_trip_is_bitwise_and_placed_like_the_example(tmp_path, impl):
    state = make_state(4, impl)
    replicated = NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec())
    example = jax.device_put(make_state(0, impl), replicated)
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(example) is None
        checkpoints.save(state, notes={"first_loss": 0.1})
        checkpoints.wait()
    with open_checkpoints(tmp_path) as checkpoints:
        for like in (example, jax.eval_shape(lambda: make_state(0, impl))):
            restored = checkpoints.restore_latest(like)
            assert restored is not None and restored.notes == {"first_loss": 0.1}
            assert_bitwise_equal(restored.state, state)
        placed = checkpoints.restore_latest(example)
        assert placed is not None
        assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(placed.state))


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
    state = make_state(1)._replace(meta_params={"params": jnp.ones(200_000)})
    example = jax.tree.map(lambda leaf: leaf.copy(), state)
    overwrite = jax.jit(
        lambda s: s._replace(meta_params=jax.tree.map(jnp.negative, s.meta_params)),
        donate_argnums=0,
    )
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        restored = checkpoints.restore_latest(example)
    assert restored is not None
    assert_bitwise_equal(restored.state, example)


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: float("inf"), 6: 1.5}
    with open_checkpoints(tmp_path, keep_last=2) as checkpoints:
        assert checkpoints.restore_best(make_state(0)) is None
        for step, loss in losses.items():
            checkpoints.save(make_state(step), valid_loss=loss)
    with open_checkpoints(tmp_path, keep_last=2) as checkpoints:  # known from the files alone
        assert checkpoints.steps == [2, 5, 6]
        best = checkpoints.restore_best(make_state(0))
        assert best is not None and int(best.state.step) == 2 and best.valid_loss == 1.0
        checkpoints.save(make_state(7), valid_loss=0.5)
        checkpoints.wait()
        assert checkpoints.steps == [6, 7]


def test_no_best_where_nothing_was_evaluated(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1))
        assert checkpoints.restore_best(make_state(0)) is None


def test_another_config_is_refused_by_field(tmp_path):
    save(tmp_path, 1)
    other = Fingerprint({"seed": 0, "outer": {"learning_rate": 0.2, "betas": (0.9, 0.99)}})
    with (
        open_checkpoints(tmp_path, other) as checkpoints,
        pytest.raises(UserError, match=r"\(outer\.learning_rate: 0\.1 saved, 0\.2 now\)"),
    ):
        checkpoints.restore_latest(make_state(0))


def test_another_state_is_refused_by_leaf(tmp_path):
    save(tmp_path, 1)
    narrow = make_state(0)
    narrow = narrow._replace(hparams={})
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            UserError, match=r"\['w'\] is float32\[2, 3\] there and float32\[2, 4\]"
        ):
            checkpoints.restore_latest(make_state(0, width=4))
        with pytest.raises(
            UserError, match=r"\.hparams\['inner_learning_rate'\] is .* absent here"
        ):
            checkpoints.restore_latest(narrow)
        with pytest.raises(UserError, match=r"\.key is key<fry>\[\] there and key<rbg>\[\] here"):
            checkpoints.restore_latest(make_state(0, impl="rbg"))


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    state = make_state(2)
    state.meta_params["params"]["half"] = jnp.full(5, jnp.nan, jnp.bfloat16)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1))
        with pytest.raises(FloatingPointError, match="half"):
            checkpoints.save(state)
        assert checkpoints.steps == [1]


def flip_bits(directory):
    """All over all files: a single one may hit a byte that nothing is read from."""
    for path in directory.rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[::16] = bytes(byte ^ 1 for byte in data[::16])
        path.write_bytes(data)


def cut_short(directory):
    for path in (directory / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:20])


def lose_the_state(directory):
    shutil.rmtree(directory / "state")


def lose_the_manifest(directory):
    (directory / MANIFEST).unlink()


def garble_the_host_file(directory):
    (directory / "host" / "metadata").write_text('{"finger')


@pytest.mark.parametrize(
    "damage", [flip_bits, cut_short, lose_the_state, lose_the_manifest, garble_the_host_file]
)
def test_falls_back_from_a_damaged_checkpoint(tmp_path, capsys, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(make_state(0))
        assert restored is not None
        assert_bitwise_equal(restored.state, make_state(1))
        assert "warning: step 2 is damaged" in capsys.readouterr().err
        assert list(tmp_path.glob("damaged-2-*")), "it is set aside, not deleted"
        checkpoints.save(make_state(2))  # the step can be saved again
        checkpoints.wait()
        again = checkpoints.restore_latest(make_state(0))
    assert again is not None
    assert_bitwise_equal(again.state, make_state(2))


def test_any_flipped_bit_is_seen_and_the_checkpoint_before_used(tmp_path, capfd):
    """In every file of the newest; half of the flips in what was noted beside the arrays."""
    rng, whole, damaged = np.random.default_rng(0), tmp_path / "whole", tmp_path / "damaged"
    save(whole, 1, 2, notes={"rate": 0.125})
    files = [path for path in sorted((whole / "2").rglob("*")) if path.is_file()]
    found = []
    for path in [*files, *[whole / "2" / "host" / "metadata"] * len(files)]:
        shutil.copytree(whole, damaged)
        target = damaged / path.relative_to(whole)
        data = bytearray(target.read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        target.write_bytes(data)
        capfd.readouterr()
        with open_checkpoints(damaged) as checkpoints:
            restored = checkpoints.restore_latest(make_state(0))
        said = [x for x in capfd.readouterr().err.splitlines() if not re.match(".*:absl:", x)]
        assert restored is not None and restored.notes == {"rate": 0.125}
        found.append(int(restored.state.step))
        assert_bitwise_equal(restored.state, make_state(found[-1]))
        if found[-1] == 2:
            assert not said and target.parent.name == "2", "what orbax notes beside decides nothing"
        else:
            assert len(said) == 1 and "step 2 is damaged" in said[0] and "step 1 is used" in said[0]
        shutil.rmtree(damaged)
    assert found.count(1) > 0.7 * len(found)


def test_a_damaged_record_may_have_been_the_best(tmp_path, capsys):
    with open_checkpoints(tmp_path) as checkpoints:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.9)):
            checkpoints.save(make_state(step), valid_loss=loss)
    garble_the_host_file(tmp_path / "2")
    with open_checkpoints(tmp_path) as checkpoints:
        latest, best = (
            f(make_state(0)) for f in (checkpoints.restore_latest, checkpoints.restore_best)
        )
    assert latest is not None and int(latest.state.step) == 3
    assert best is not None and int(best.state.step) == 1
    assert "step 2 is damaged" in capsys.readouterr().err


def test_goes_on_with_another_number_of_devices_and_says_so(tmp_path, capsys):
    def on(number):
        mesh = Mesh(np.array(jax.devices()[:number]), ("devices",))
        return jax.device_put(make_state(number), NamedSharding(mesh, PartitionSpec()))

    for number, lines in ((2, 0), (2, 0), (4, 1)):
        execution = {"num_devices": number}
        with open_checkpoints(tmp_path, FINGERPRINT._replace(execution=execution)) as checkpoints:
            checkpoints.restore_latest(on(number))
            checkpoints.save(on(2))
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
    assert "2 cpu devices and resumes on 4 cpu devices: sums differ in the last digits" in said[0]


def test_another_training_is_refused_by_what_differs(tmp_path):
    save(tmp_path, 1)
    others = {
        "first tasks, estimate": ({"first tasks": "c"}, {"estimate": "d"}),
        "validation tasks": ({"first tasks": "a", "validation tasks": "v"}, {"another": "d"}),
    }
    for words, (arrays, programs) in others.items():
        other = FINGERPRINT._replace(arrays=arrays, programs=programs)
        with (
            open_checkpoints(tmp_path, other) as checkpoints,
            pytest.raises(UserError, match=rf"of another training.*differs: {words}\)"),
        ):
            checkpoints.restore_latest(make_state(0))


def test_under_another_jax_the_program_is_not_compared_and_that_is_said(
    tmp_path, capsys, monkeypatch
):
    save(tmp_path, 1)
    monkeypatch.setattr(jax, "__version__", "99.0")
    other = FINGERPRINT._replace(programs={"estimate": "d"})
    with open_checkpoints(tmp_path, other) as checkpoints:
        assert checkpoints.restore_latest(make_state(0)) is not None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"under jax {jax.version.__version__}, and this is 99.0" in line
    other = other._replace(arrays={"first tasks": "c"})
    with (
        open_checkpoints(tmp_path, other) as checkpoints,
        pytest.raises(UserError, match=r"what differs: first tasks\)"),
    ):
        checkpoints.restore_latest(make_state(0))


def test_says_so_when_none_can_be_read(tmp_path):
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        lose_the_state(tmp_path / step)
    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"none of the checkpoints .* can be read"),
    ):
        checkpoints.restore_latest(make_state(0))
    assert (tmp_path / "1").exists() and (tmp_path / "2").exists()


def test_a_save_that_was_killed_leaves_the_one_before(tmp_path):
    save(tmp_path, 1)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1" / "state", unfinished / "state")
    with open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(make_state(0))
    assert restored is not None and int(restored.state.step) == 1


def test_what_is_forgotten_is_not_restored_and_may_be_saved_again(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step), valid_loss=float(step))
        checkpoints.forget_after(1)
        assert checkpoints.steps == [1]
        again = make_state(2)._replace(hparams={"inner_learning_rate": jnp.float32(0.7)})
        checkpoints.save(again, valid_loss=0.5)
        checkpoints.wait()
        restored = checkpoints.restore_best(make_state(0))
        assert restored is not None
        assert_bitwise_equal(restored.state, again)


def test_the_notes_may_say_what_the_state_is_like(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1, width=5), notes={"width": 5})
        checkpoints.wait()
        restored = checkpoints.restore_latest(lambda notes: make_state(0, width=notes["width"]))
        assert restored is not None
        assert_bitwise_equal(restored.state, make_state(1, width=5))
        with pytest.raises(UserError, match="hold another state"):
            checkpoints.restore_latest(make_state(0))


def test_what_cannot_be_written_is_one_line_and_the_last_good_step_stays(tmp_path, capfd):
    def large(step):
        noise = jax.random.normal(jax.random.key(step), (50_000,))
        return make_state(step)._replace(meta_params={"params": noise, "more": noise[::-1]})

    def save_all(*steps):
        with open_checkpoints(tmp_path) as checkpoints:
            for step in steps:
                checkpoints.save(large(step))

    save_all(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)") as caught:
            save_all(2, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and "Traceback" not in capfd.readouterr().err
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        restored = checkpoints.restore_latest(large(0))
    assert restored is not None
    assert_bitwise_equal(restored.state, large(1))
    save_all(2)
    assert not list(tmp_path.glob("*tmp*")), "what was begun is taken away"
