"""Bags are the same for any number of readers, and training resumes at the exact slide.

Workers, prefetching and restarts do not change bags. Faults arrive with the slide's name: raised by
default, or a `Skipped` record with `on_error: skip`.
"""

import multiprocessing
import time
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from slides.errors import NoTissueError, SettingsError, UnreadableRegionError
from slides.streaming.augment import draw_augmentation
from slides.streaming.stream import (
    Augment,
    BagDataset,
    Skipped,
    SlideLoader,
    SlideSampler,
    TileBag,
    Turn,
    WorkerDiedError,
    sample_tiles,
    slide_generator,
)
from tests.sources import SIZE, Source, expected_tiles, make_index, make_row

TILES, SLIDES, SEED = 23, 7, 3

pytestmark = pytest.mark.timeout(60)


class Open:
    """Opens any slide of the cohort; some are broken."""

    def __init__(self, faults=None, tiles=TILES):
        self.faults, self.tiles, self.sources = faults or {}, tiles, []

    def __call__(self, row):
        fault = self.faults.get(row.slide_id)
        if isinstance(fault, Exception):
            raise fault
        source = Source(**(fault or {}))
        self.sources.append(source)
        return source, make_index(self.tiles, row.slide_id)


def bags_of(open_slide=None, **options):
    rows = [make_row(number) for number in range(SLIDES)]
    return BagDataset(rows, open_slide or Open(), **options)


def training_bags(**options):
    return bags_of(budget=5, seed=SEED, augment=Augment(colour=0.1), **options)


def same(one, other):
    return (
        (one.slide_id, one.case_id, one.turn) == (other.slide_id, other.case_id, other.turn)
        and torch.equal(one.tiles, other.tiles)
        and np.array_equal(one.coords0, other.coords0)
        and torch.equal(one.labels.nan_to_num(-1), other.labels.nan_to_num(-1))
    )


def test_a_validation_bag_is_the_whole_slide_as_it_is():
    bag = bags_of()[4]
    index = make_index(TILES)
    np.testing.assert_array_equal(bag.tiles.numpy(), expected_tiles(index))
    np.testing.assert_array_equal(bag.coords0, index.coords0)
    assert (bag.slide_id, bag.case_id, bag.turn) == ("slide.4", "case.4", Turn(0, 4, 4))
    assert bag.tiles.dtype == torch.uint8
    assert bag.labels.dtype == torch.float32
    assert bag.labels[0] == 1
    assert bag.labels[1].isnan()  # unknown never becomes 0


def test_a_training_bag_is_its_draw_of_tiles_augmented():
    """The reference combines the three pure functions by hand."""
    turn = Turn(2, 0, 6)
    rows = sample_tiles(TILES, 5, SEED, 2, "slide.6")
    tiles = torch.from_numpy(expected_tiles(make_index(TILES), rows))
    tiles = draw_augmentation(5, slide_generator(SEED, 2, "slide.6"), colour=0.1)(tiles)
    bag = training_bags()[turn]
    assert torch.equal(bag.tiles, tiles)
    np.testing.assert_array_equal(bag.coords0, make_index(TILES).coords0[rows])


def test_epochs_and_slides_differ():
    bags = training_bags()
    bag = bags[Turn(0, 0, 0)]
    assert same(bag, bags[Turn(0, 0, 0)])
    assert not torch.equal(bag.tiles, bags[Turn(1, 0, 0)].tiles)
    assert not torch.equal(bag.tiles, bags[Turn(0, 0, 1)].tiles)


def test_a_bag_does_not_depend_on_its_place_in_the_order():
    bags = training_bags()
    assert torch.equal(bags[Turn(1, 2, 3)].tiles, bags[Turn(1, 5, 3)].tiles)


def test_slides_are_closed_after_use():
    open_slide = Open()
    bags_of(open_slide)[0]
    broken = Open({"slide.1": {"fail_at": (0, 0)}})
    with pytest.raises(UnreadableRegionError):
        bags_of(broken)[1]
    assert [source.closed for source in open_slide.sources + broken.sources] == [1, 1]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_read_the_same_bags_in_the_same_order(workers):
    sampler = SlideSampler(SLIDES, SEED)
    sampler.set_epoch(1)
    expected = [training_bags()[turn] for turn in sampler]
    loaded = list(SlideLoader(training_bags(), sampler, workers))
    assert len(loaded) == SLIDES
    assert all(same(one, other) for one, other in zip(loaded, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_sampler_slides_come_in_the_tables_order(workers):
    loader = SlideLoader(bags_of(), workers=workers)
    assert [bag.slide_id for bag in loader] == [f"slide.{n}" for n in range(SLIDES)]
    assert len(loader) == SLIDES


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_numbers_of_training_alone(workers):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(SlideLoader(training_bags(), SlideSampler(SLIDES), workers))
    assert torch.equal(torch.rand(3), expected)


BROKEN = {"slide.2": {"fail_at": (0, SIZE)}}


class TestFaults:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_fault_arrives_as_itself_with_the_slides_name(self, workers):
        loader = iter(SlideLoader(bags_of(Open(BROKEN)), workers=workers))
        assert [bag.slide_id for bag in islice(loader, 2)] == ["slide.0", "slide.1"]
        with pytest.raises(UnreadableRegionError) as caught:
            next(loader)
        assert str(caught.value) == "slide.2: slide.a: bad bytes"

    @pytest.mark.parametrize("workers", [0, 2])
    def test_skip_gives_a_record_in_its_place(self, workers):
        bags = bags_of(Open(BROKEN), on_error="skip")
        loaded = list(SlideLoader(bags, workers=workers))
        assert len(loaded) == SLIDES
        assert loaded[2] == Skipped("slide.2", "slide.2: slide.a: bad bytes", Turn(0, 2, 2))
        assert all(isinstance(bag, TileBag) for bag in loaded[:2] + loaded[3:])

    def test_a_slide_that_does_not_open_is_skipped_too(self):
        bags = bags_of(Open({"slide.1": FileNotFoundError(2, "No such file")}), on_error="skip")
        assert "slide.1: the disk gave an error" in bags[1].reason

    @pytest.mark.parametrize("on_error", ["stop", "skip"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_bug_always_stops_and_names_the_slide(self, workers, on_error):
        open_slide = Open({"slide.3": ZeroDivisionError("by zero")})
        loader = SlideLoader(bags_of(open_slide, on_error=on_error), workers=workers)
        with pytest.raises(RuntimeError, match=r"slide\.3: ZeroDivisionError"):
            list(loader)

    def test_workers_are_gone_when_the_fault_arrives(self):
        """A traceback that is kept, like here, must not make them wait."""
        before = multiprocessing.active_children()
        loader = SlideLoader(bags_of(Open(BROKEN)), workers=2)
        with pytest.raises(UnreadableRegionError):
            list(loader)
        assert multiprocessing.active_children() == before

    def test_a_slide_without_tiles_is_a_fault(self):
        with pytest.raises(NoTissueError, match=r"slide\.0: its index has no tile"):
            bags_of(Open(tiles=0))[0]

    def test_a_killed_worker_is_an_error_with_the_names_of_slides_in_work(self):
        open_slide = Open({"slide.2": {"die_at": (0, SIZE)}})
        with pytest.raises(WorkerDiedError, match=r"slide\.2.*: .*died .*fewer workers"):
            list(SlideLoader(bags_of(open_slide), workers=2))

    def test_a_worker_whose_death_is_told_late_is_named_all_the_same(self, monkeypatch):
        """Torch raises it wherever the program is, and that may be while the others are stopped."""
        shut_down, told = _MultiProcessingDataLoaderIter._shutdown_workers, []

        def late(self):
            shut_down(self)
            if not told:  # as the loader stops it; later it is collected
                told.append(True)
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

        monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", late)
        open_slide = Open({"slide.2": {"die_at": (0, SIZE)}})
        with pytest.raises(WorkerDiedError, match=r"slide\.2.*: .*died .*fewer workers"):
            list(SlideLoader(bags_of(open_slide), workers=2))
        assert told

    @pytest.mark.parametrize(
        ("options", "text"),
        [({"on_error": "ignore"}, "stop or skip"), ({"budget": 0}, "data.tiles_per_slide")],
    )
    def test_impossible_options_are_refused_at_construction(self, options, text):
        with pytest.raises(SettingsError, match=text):
            bags_of(**options)


def test_no_more_bags_are_read_than_the_workers_may():
    reads = multiprocessing.Value("i", 0)

    def open_slide(row):
        with reads.get_lock():
            reads.value += 1
        return Source(), make_index(3, row.slide_id)

    rows = [make_row(number) for number in range(31)]
    bags = iter(SlideLoader(BagDataset(rows, open_slide), workers=2, prefetch=2))
    for taken in (1, 2, 3):
        next(bags)
        deadline = time.monotonic() + 20
        while reads.value < taken + 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert reads.value == taken + 4
    del bags


def test_only_labels_move_to_the_device():
    bag = bags_of()[0]
    moved = bag.to("meta")
    assert moved.labels.device.type == "meta"
    assert moved.tiles is bag.tiles


class TestResume:
    """Uses Lightning's own Trainer, checkpoint and progress, without imitation."""

    EPOCHS = 3

    def fit(self, log, workers, checkpoint=None, save_at=None, **options):
        L = pytest.importorskip("lightning")

        class Data(L.LightningDataModule):
            def __init__(self):
                super().__init__()
                self.sampler = SlideSampler(SLIDES, SEED)

            def train_dataloader(self):
                return SlideLoader(training_bags(), self.sampler, workers)

            def val_dataloader(self):
                return SlideLoader(bags_of())

            def state_dict(self):
                return self.sampler.state_dict()

            def load_state_dict(self, state):
                self.sampler.load_state_dict(state)

        class Module(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False
                self.weight = torch.nn.Parameter(torch.zeros(()))

            def training_step(self, bag, number):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                (self.weight * bag.tiles.float().mean()).backward()
                optimizer.step()
                log.append((bag.turn, int(bag.tiles.sum())))
                self.trainer.datamodule.sampler.trained(bag.turn)

            def validation_step(self, bag, number):
                pass

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.01)

        class Save(L.Callback):
            def save(self, trainer, when):
                if save_at == (when, len(log)):
                    trainer.save_checkpoint(checkpoint)

            def on_train_batch_end(self, trainer, *_):
                self.save(trainer, "step")

            def on_validation_end(self, trainer, *_):
                self.save(trainer, "validation")

            def on_train_epoch_end(self, trainer, *_):
                self.save(trainer, "epoch")

        module = Module()
        trainer = L.Trainer(
            max_epochs=self.EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[Save()],
            **options,
        )
        resume = None if save_at else checkpoint
        trainer.fit(module, datamodule=Data(), ckpt_path=resume)
        return module.weight.detach()

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(
        "save_at", [("step", 3), ("step", 7), ("step", 9), ("validation", 7), ("epoch", 14)]
    )
    def test_the_rest_of_a_run_is_the_rest_of_the_unbroken_run(self, tmp_path, workers, save_at):
        torch.set_num_threads(1)
        checkpoint = str(tmp_path / "a.ckpt")
        unbroken, resumed = [], []
        weight = self.fit(unbroken, workers, checkpoint, save_at)
        assert len(unbroken) == self.EPOCHS * SLIDES
        assert torch.equal(self.fit(resumed, workers, checkpoint), weight)
        assert unbroken[: save_at[1]] + resumed == unbroken

    @pytest.mark.filterwarnings("ignore")
    def test_shortened_epochs_resume_too(self, tmp_path):
        checkpoint, unbroken, resumed = str(tmp_path / "a.ckpt"), [], []
        self.fit(unbroken, 2, checkpoint, ("epoch", 5), limit_train_batches=5)
        self.fit(resumed, 2, checkpoint, limit_train_batches=5)
        assert len(unbroken) == 15
        assert unbroken[:5] + resumed == unbroken

    def test_lightning_counts_the_loader_as_resumable(self):
        from lightning.fabric.utilities.types import _Stateful

        loader = SlideLoader(training_bags(), SlideSampler(SLIDES, SEED))
        assert isinstance(loader, _Stateful)
        loader.load_state_dict(loader.state_dict() | {"epoch": 1, "start": 5})
        assert [bag.turn.position for bag in loader] == [5, 6]


def test_a_bag_passes_lightnings_precision_plugins():
    """They rebuild batches field by field; tiles stay bytes, and labels keep their unknowns."""
    plugins = pytest.importorskip("lightning.pytorch.plugins.precision")
    for plugin in (plugins.HalfPrecision("bf16-true"), plugins.DoublePrecision()):
        bag = plugin.convert_input(bags_of()[0])
        assert bag.tiles.dtype == torch.uint8
        assert bag.labels[1].isnan()
