"""A setting that cannot work gives one line that names it, a status that is not 0, and leaves nothing behind."""

import re
from copy import deepcopy
from functools import cache

import pytest
from conftest import command, compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydra_plugins.skiprnn_launchers import ProcessesLauncher
from skiprnn import bench, claims, dashboard, sitting, tables, train
from skiprnn.data.ucf101 import __main__ as ucf101
from skiprnn.papers import sweep

SMALL = ["model.hidden_size=4", "training.epochs=1", "training.batch_size=64", "threads=1", "device=cpu"]
FEW = ["++training.train_batches=1", "++training.evaluation_batches=1"]  # should one be taken, it is soon over
PLACES = ["output=out", "data_root=data"]
GROUPS = ("data=", "model=", "profile=", "logger=")

parse = OverridesParser.create().parse_overrides
composed = cache(lambda groups: compose(list(groups)))


def config_of(overrides):
    """What Hydra composes, once for each choice of groups: it takes a tenth of a second for it."""
    groups = tuple(one for one in overrides if one.startswith(GROUPS))
    config = deepcopy(composed(groups))
    ConfigLoaderImpl._apply_overrides_to_config(parse([one for one in overrides if one not in groups]), config)
    return config


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A function: what is called, and what it must say."""
    monkeypatch.chdir(tmp_path)

    def check(call, message):
        with pytest.raises(SystemExit) as left:
            call()
        said = left.value.code
        assert isinstance(said, str), "status 0"
        assert said.startswith("error: ")
        assert "\n" not in said
        assert re.search(message, said), said
        assert not list(tmp_path.iterdir()), "something is left behind"

    return check


RUNS = [
    # model
    ("model.hidden_size=0", "model.hidden_size=0: must be at least 1"),
    ("model.hidden_size=-3", "model.hidden_size=-3: must be at least 1"),
    ("model.hidden_size=1e9", r"model.hidden_size: Value '1000000000.0' of type 'float'"),
    ("model.hidden_size=1000000000", "model.hidden_size=1000000000: must be at most 65536"),
    ("model.hidden_size=65536 model.num_layers=1000", r"the weights need [\d,]+ GiB of memory"),
    ("model.hidden_size=2.5", "model.hidden_size: Value '2.5'"),
    ("model.hidden_size=ten", "model.hidden_size: Value 'ten'"),
    ("model.hidden_size=null", "model.hidden_size: Incompatible value 'None'"),
    ("model.hidden_size=[3]", "model.hidden_size: "),
    ("model.hidden_size=true", "model.hidden_size: Value 'True'"),
    ("model.hidden_size=${nothing}", "model.hidden_size: Interpolation key 'nothing' not found"),
    ("model.hidden_size=${oc.env:NOTHING}", "model.hidden_size: .*'NOTHING' not found"),
    ("model.num_layers=0", "model.num_layers=0: must be at least 1"),
    ("model.num_layers=1000000000", "model.num_layers=1000000000: must be at most 1024"),
    ("model.num_layers=many", "model.num_layers: Value 'many'"),
    ("model.embedding_size=0", "model.embedding_size=0: must be at least 1"),
    ("model.embedding_size=100000000", "model.embedding_size=100000000: must be at most"),
    ("model.cell=rnn", "model.cell=rnn: there are lstm, gru"),
    ("model.cell=null", "model.cell: Incompatible value 'None'"),
    ("model.policy=never", "model.policy=never: there are "),
    ("model.policy=[skip]", "model.policy: Cannot convert"),
    ("model.name=../x", r"model.name=../x: letters, digits"),
    ("model.name=a/b", "model.name=a/b: letters"),
    ("model.name=..", r"model.name=..: letters"),
    ("model.name=''", "model.name=: letters"),
    (f"model.name={101 * 'x'}", "model.name=x+: letters, .* at most 100 of them"),
    ("model.name=null", "model.name: Incompatible value 'None'"),
    ("model.cost_per_sample=inf", "model.cost_per_sample=inf: λ must be finite and not negative"),
    ("model.cost_per_sample=nan", "model.cost_per_sample=nan: λ must be finite"),
    ("model.cost_per_sample=1e400", "model.cost_per_sample=inf: λ must be finite"),
    ("model.cost_per_sample=-1e-4", "model.cost_per_sample=-0.0001: λ must be finite and not negative"),
    ("model.cost_per_sample=1e300", "model.cost_per_sample=1e.300: λ must be finite and not negative, at most 1e.30"),
    ("model.cost_per_sample=much", "model.cost_per_sample: Value 'much'"),
    ("model.dropout=1", r"model.dropout=1.0: must be in \[0, 1\)"),
    ("model.dropout=-0.1", "model.dropout=-0.1: must be in"),
    ("model.dropout=nan", "model.dropout=nan: must be in"),
    ("model.learn_initial_state=perhaps", "model.learn_initial_state: Value 'perhaps' is not a valid bool"),
    ("+model.p_skip=0.5", "model.p_skip: policy skip draws nothing; remove it"),
    ("model=random_skip_lstm model.p_skip=1.5", r"model.p_skip=1.5: a probability lies in \[0, 1\]"),
    ("model=random_skip_lstm model.p_skip=-0.5", "model.p_skip=-0.5: a probability"),
    ("model=random_skip_lstm model.p_skip=nan", "model.p_skip=nan: a probability"),
    ("model=random_skip_lstm model.p_skip=null", "model.p_skip: policy random needs it|needs it"),
    ("model=random_skip_lstm model.p_skip=half", "model.p_skip: Value 'half'"),
    ("+model.colour=red", "model.colour: Key 'colour' not in 'ModelConfig'"),
    ("+model.layer_norm=true", "model.layer_norm=True: there is no such option any more"),
    ("~model.cell", "model.cell|cell"),
    ("~model.hidden_size", "hidden_size"),
    # training
    ("training.epochs=0", "training.epochs=0: must be at least 1"),
    ("training.epochs=-1", "training.epochs=-1: must be at least 1"),
    ("training.epochs=many", "training.epochs: Value 'many'"),
    ("training.epochs=1.5", "training.epochs: Value '1.5'"),
    ("training.epochs=1000000000000000", "training.epochs=1000000000000000: must be at most"),
    ("training.batch_size=0", "training.batch_size=0: must be at least 1"),
    ("training.batch_size=-5", "training.batch_size=-5: must be at least 1"),
    ("training.batch_size=1e6", "training.batch_size: Value '1000000.0'"),
    ("training.batch_size=100000000000", "training.batch_size=100000000000: must be at most"),
    ("training.batch_size=5000 data.drop_last=true", "on digits: batch_size 5000 with drop_last leaves none of 1197"),
    ("training.learning_rate=0", "training.learning_rate=0.0: must be positive and finite"),
    ("training.learning_rate=-1", "training.learning_rate=-1.0: must be positive"),
    ("training.learning_rate=inf", "training.learning_rate=inf: must be positive and finite"),
    ("training.learning_rate=nan", "training.learning_rate=nan: must be positive"),
    ("training.learning_rate=1e300", r"training.learning_rate=1e\+300: must be positive and finite, at most 1e.30"),
    ("training.gradient_clip=1e300", r"training.gradient_clip=1e\+300: must be positive and finite, at most 1e.30"),
    ("training.learning_rate=fast", "training.learning_rate: Value 'fast'"),
    ("training.gradient_clip=0", "training.gradient_clip=0.0: must be positive"),
    ("training.gradient_clip=nan", "training.gradient_clip=nan: must be positive"),
    ("training.gradient_clip=null", "training.gradient_clip: Incompatible value 'None'"),
    ("training.cost_free_epochs=40", "training.cost_free_epochs=40: must be at least 0 and below epochs=1"),
    ("training.cost_free_epochs=-1", "training.cost_free_epochs=-1: must be at least 0"),
    ("training.decay_epochs=41", "training.decay_epochs=41: must be at least 0 and at most"),
    ("training.decay_epochs=-1", "training.decay_epochs=-1: must be"),
    ("training.epochs=40 training.decay_epochs=30 training.warmup_epochs=11", "training.warmup_epochs=11: must be"),
    ("training.warmup_epochs=-1", "training.warmup_epochs=-1: must be"),
    ("++training.train_batches=0", "training.train_batches=0: must be at least 1"),
    ("++training.evaluation_batches=-2", "training.evaluation_batches=-2: must be at least 1"),
    ("+training.momentum=0.9", "training.momentum: Key 'momentum' not in 'TrainingConfig'"),
    ("~training.learning_rate", "learning_rate"),
    # the run
    ("seed=-1", "seed=-1: must be 0 or more"),
    ("seed=abc", "seed: Value 'abc'"),
    ("seed=9223372036854775808", r"seed=9223372036854775808: must be 0 or more, and below 2\*\*63"),
    ("seed=1.5", "seed: Value '1.5'"),
    ("seed=null", "seed: Incompatible value 'None'"),
    ("seed=[0]", "seed: "),
    ("seed=true", "seed: Value 'True'"),
    ("~seed", "seed"),
    ("pack=0", "pack=0: must be at least 1"),
    ("pack=2 seed=7", "pack=2 is for many runs: add -m"),
    ("pack=-1", "pack=-1: must be at least 1"),
    ("pack=many", "pack: Value 'many'"),
    ("threads=0", "threads=0: must be at least 1"),
    ("threads=-1", "threads=-1: must be at least 1"),
    ("threads=100000000", "threads=100000000: must be at most 1024"),
    ("threads=many", "threads: Value 'many'"),
    ("threads=1.5", "threads: Value '1.5'"),
    ("engine=steam", "engine=steam: there are auto, reference, compact, native, batched, triton"),
    ("engine=null", "engine: Incompatible value 'None'"),
    ("engine=compact", "on digits: the compact engine can't run this: a learned"),
    ("device=tpu", "device=tpu: there are auto, cpu, cuda"),
    ("device=null", "device: Incompatible value 'None'"),
    ("output=/proc/skiprnn", "output=/proc/skiprnn: cannot write /proc/skiprnn/digits"),
    ("output=null", "output: Incompatible value 'None'"),
    ("output=[1]", "output: Cannot convert"),
    ("data_root=null", "data_root: Incompatible value 'None'"),
    ("experiment=table1", "experiment=table1 is many runs: add -m"),
    ("profile.name=../../x", r"profile.name=../../x: letters, digits"),
    ("profile.name=null", "profile.name=None: letters, digits"),
    ("profile.name=3", "profile.name=3: letters, digits"),
    ("profile.note=[1]", r"profile.note=\[1\]: must be a text"),
    ("profile.note=null", "profile.note=None: must be a text"),
    ("logger.csv=null", "logger.csv=None: "),
    ("logger.csv=1", "logger.csv=1: "),
    ("logger.csv._target_=os.system", "logger.csv=.*os.system.*blocklisted"),
    ("logger.csv._target_=skiprnn.Nothing", "logger.csv=.*Error locating target 'skiprnn.Nothing'"),
    ("logger.csv._target_=null", "logger.csv=.*"),
    ("+logger.csv.colour=red", "logger.csv=.*"),
    ("~logger.csv._target_", "logger.csv=.*: it has no _target_"),
    ("+logger.mine.level=3", "logger.mine=.*: it has no _target_"),
    ("+colour=red", "colour: Key 'colour' not in 'RunConfig'"),
    ("seeds=[]", r"seeds=\[\]: must be different numbers from 0 on, such as \[0, 1\]"),
    ("seeds=abc", r"seeds: .*no list, such as \[1, 2\]"),
    ("seeds=3", "seeds: .*no list"),
    ("seeds=[0,0]", r"seeds=\[0, 0\]: must be different numbers"),
    ("seeds=[-1]", r"seeds=\[-1\]: must be different numbers from 0 on"),
    ("seeds=[1.5]", r"seeds\[0\]: Value '1.5'"),
    ("seeds=[a,b]", r"seeds\[0\]: Value 'a'"),
    ("rows=3", "rows: .*no list"),
    ("rows=abc", "rows: .*no list"),
    ("rows=[0]", r"rows=\[0\]: must be different numbers from 1 on"),
    ("rows=[1,1]", r"rows=\[1, 1\]: must be different numbers"),
    ("target_updates=0", "target_updates=0.0: must be a share of the steps"),
    ("target_updates=1.5", "target_updates=1.5: must be a share of the steps, above 0 and at most 1"),
    ("target_updates=half", "target_updates: Value 'half'"),
    ("rows=[]", r"rows=\[\]: must be different numbers"),
    ("rows=[true]", r"rows\[0\]: Value 'True'"),
    # data
    ("data.name=../../x", r"data.name=../../x: letters, digits"),
    ("data.name=/tmp/x", "data.name=/tmp/x: letters"),
    ("data.name=null", "data.name=None: letters"),
    ("data.name=3", "data.name=3: letters"),
    ("~data.name", "data.name=None: letters"),
    ("data._target_=os.system", r"data=digits: no conf/data/\*.yaml has the _target_ os.system"),
    ("data._target_=null", "data=digits: no conf/data"),
    ("~data._target_", "data=digits: no conf/data"),
    ("data.drop_last=maybe", "data.drop_last=maybe: must be bool"),
    ("data.drop_last=1", "data.drop_last=1: must be bool"),
    ("data.drop_last=null", "data.drop_last=None: must be bool"),
    (f"data.name={101 * 'x'}", "data.name=x+: letters, .* at most 100 of them"),
    ("data.name=[digits]", r"data.name=\['digits'\]: letters"),
    ("data.name=true", "data.name=True: letters"),
    ("data._target_=skiprnn.data.digits.Nothing", r"no conf/data/\*.yaml has the _target_"),
    ("data._target_=[os.system]", r"no conf/data/\*.yaml has the _target_"),
    ("+data._partial_=true", "data=digits: .*'_partial_'"),
    ("+data._args_=[1]", "data=digits: .*'_args_'"),
    ("+data.pixels=3", "data=digits: pixels must be 1, 2, 4 or 8"),
    ("+data.pixels=0", "data=digits: pixels must be"),
    ("+data.pixels=many", "data.pixels=many: must be int"),
    ("+data.pixels=null", "data.pixels=None: must be int"),
    ("+data.pixels={a:1}", "data.pixels=.*: must be int"),
    ("+data.hold=0", "data=digits: hold must be at least 1"),
    ("+data.hold=1000000000", "data=digits: hold must be at least 1, and at most 1024"),
    ("+data.colour=red", "data=digits: .*'colour'"),
    ("+data.batch_size=3", "data.batch_size=3: the setting is training.batch_size"),
    ("+data.seed=3", "data.seed=3: the setting is seed"),
    ("+data.root=/tmp", "data.root=/tmp: the setting is data_root"),
    ("data=adding data.length=1", "data=adding: length must be at least 2"),
    ("data=adding data.length=1000000000000", r"data=adding: its validation and test batches need [\d,]+ GiB"),
    ("data=adding data.length=2.5", "data.length=2.5: must be int"),
    ("data=adding data.low=nan", "data.low=nan: must be float"),
    ("data=adding data.low=0.5", "data=adding: low must be below high"),
    ("data=adding data.high=inf", "data.high=inf: must be float"),
    ("data=adding data.high=nan", "data.high=nan: must be float"),
    ("data=adding data.low=null", "data.low=None: must be float"),
    ("data=adding data.markers=null", "data.markers=None: must be str"),
    ("data=adding data.markers=[halves]", r"data.markers=\['halves'\]: must be str"),
    ("data=adding data.length=true", "data.length=True: must be int"),
    ("data=adding data.length=-1", "data=adding: length must be at least 2"),
    ("data=adding +data.drop_last=true", "data=adding: .*'drop_last'"),
    ("data=adding data.batches_per_epoch=many", "data.batches_per_epoch=many: must be int"),
    ("data=adding data.validation_batches=0", "data=adding: every split must have at least one batch"),
    ("data=adding data.test_batches=1e3", "data.test_batches=1000.0: must be int"),
    ("data=adding_sarnn data.length=1", "data=adding_sarnn: length must be at least 2"),
    ("data=adding_sarnn data.markers=nowhere", "data=adding_sarnn: markers must be"),
    ("data=adding data.markers=nowhere", "data=adding: markers must be"),
    ("data=adding data.batches_per_epoch=0", "data=adding: every split must have at least one batch"),
    ("data=adding data.test_batches=-1", "data=adding: every split must have at least one batch"),
    ("data=adding data.validation_batches=100000000000", "data=adding: its validation and test batches need"),
    ("data=frequency data.sampling_period=0", "data=frequency: sampling_period must be in"),
    ("data=frequency data.sampling_period=1e-300", "data=frequency: its validation and test batches need"),
    ("data=frequency data.sampling_period=1e-307", "data=frequency: cannot convert"),
    ("data=frequency data.duration=inf", "data.duration=inf: must be float"),
    ("data=frequency data.phase=moon", "data=frequency: phase must be"),
    ("data=frequency data.low=-1", "data=frequency: periods must satisfy"),
    ("data=frequency data.target_low=7", "data=frequency: periods must satisfy"),
    ("data=frequency data.low=5 data.high=6", "data=frequency: low and high must leave class 1"),
    ("data=frequency data.sampling_period=-1", "data=frequency: sampling_period must be in"),
    ("data=frequency data.sampling_period=nan", "data.sampling_period=nan: must be float"),
    ("data=frequency data.sampling_period=often", "data.sampling_period=often: must be float"),
    ("data=frequency data.duration=-1", "data=frequency: "),
    ("data=frequency data.duration=0", "data=frequency: "),
    ("data=frequency data.high=0", "data=frequency: periods must satisfy"),
    ("data=frequency data.target_high=4", "data=frequency: periods must satisfy"),
    ("data=frequency data.phase=null", "data.phase=None: must be str"),
    ("data=frequency data.batches_per_epoch=0", "data=frequency: every split must have at least one batch"),
    ("data=imdb data.length=many", "data.length=many: must be int"),
    ("data=imdb data.lowercase=1", "data.lowercase=1: must be bool"),
    ("data=imdb data.mask_padding=null", "data.mask_padding=None: must be bool"),
    ("data=imdb data.min_count=1.5", "data.min_count=1.5: must be int"),
    ("data=imdb data.padding=null", "data.padding=None: must be str"),
    ("data=imdb +data.reviews_per_class=0", "data=imdb: reviews_per_class must be at least 1"),
    ("data=imdb +data.reviews_per_class=1000000000", "data=imdb: reviews_per_class must be at most"),
    ("data=imdb data.padding=up", "data=imdb: padding must be"),
    ("data=imdb data.mask_padding=true", "data=imdb: mask_padding needs padding on the right"),
    ("data=imdb data.length=0", "data=imdb: length must be at least 1"),
    ("data=imdb data.length=1000000000000", "data=imdb: length must be at most"),
    ("data=imdb data.vocabulary_size=2", "data=imdb: vocabulary_size must be at least 3"),
    ("data=imdb data.vocabulary_size=1000000000000", "data=imdb: vocabulary_size must be at most"),
    ("data=imdb data.min_count=0", "data=imdb: min_count must be at least 1"),
    ("data=imdb data.vectors=[1]", r"data.vectors=\[1\]: must be str"),
    ("data=ucf101 data.split=4", "data=ucf101: split must be 1, 2 or 3"),
    ("data=ucf101 data.frames=251", "data=ucf101: frames must be from 1 to 250"),
    ("data=ucf101 data.validation_groups=0", "data=ucf101: validation_groups must be at least 1"),
    ("data=ucf101 data.split=one", "data.split=one: must be int"),
    ("data=ucf101 data.frames=0", "data=ucf101: frames must be from 1 to 250"),
    ("data=ucf101 data.allow_missing=1", "data.allow_missing=1: must be bool"),
    ("data=ucf101 data.mask_padding=maybe", "data.mask_padding=maybe: must be bool"),
    ("data=ucf101 data.store=null", "data.store=None: must be str"),
    ("data=ucf101 data.validation_groups=two", "data.validation_groups=two: must be int"),
    ("data=ucf101 data.store=nowhere", "no feature store in data/nowhere"),
]


@pytest.mark.parametrize(("overrides", "message"), RUNS, ids=[overrides for overrides, _ in RUNS])
def test_a_run_is_refused(overrides, message, refused):
    refused(lambda: train.train(config_of([*SMALL, *FEW, *PLACES, *overrides.split()])), message)


TABLE1 = "experiment=table1 data=mnist profile=mnist/smoke"
SWEEPS = [
    (f"{TABLE1} rows=3", "rows: .*no list"),
    (f"{TABLE1} rows=[99]", r"rows=\[99\]: table1 has rows 1 to \d+"),
    (f"{TABLE1} rows=[0]", r"rows=\[0\]: must be different numbers from 1 on"),
    (f"{TABLE1} rows=[a]", r"rows\[0\]: Value 'a'"),
    (f"{TABLE1} seeds=[]", r"seeds=\[\]: must be different numbers"),
    (f"{TABLE1} seeds=abc", "seeds: .*no list"),
    (f"{TABLE1} seeds=[0,0]", r"seeds=\[0, 0\]: must be different numbers"),
    (f"{TABLE1} seeds=null", "seeds: "),
    ("experiment=nothing", "experiment=nothing: there are adding"),
    ("experiment=../table1", r"experiment=\.\./table1: there are adding"),
    ("seeds=[1,2]", r"seeds=\[1,2\]: add experiment=NAME, whose it is; or -m and seed=0,1"),
    ("rows=[1]", r"rows=\[1\]: add experiment=NAME"),
    ("profile.name=../../x", r"profile.name=../../x: letters"),
    ("logger.csv=null model=gru,lstm", "logger.csv=None"),
    (f"{TABLE1} profile.note=[1]", r"profile.note=\[1\]: must be a text"),
    (f"{TABLE1} rows=[1,99]", "table1 has rows 1 to"),
    (f"{TABLE1} rows=[1.5]", r"rows\[0\]: Value '1.5'"),
    (f"{TABLE1} seeds=[1.5]", r"seeds\[0\]: Value '1.5'"),
    (f"{TABLE1} seeds=[-1]", r"seeds=\[-1\]: must be different numbers"),
    (f"{TABLE1} seed=-1", "seed=-1: must be 0 or more"),
    (f"{TABLE1} model.hidden_size=0", "model.hidden_size=0: must be at least 1"),
    (f"{TABLE1} training.epochs=0", "training.epochs=0: must be at least 1"),
    (f"{TABLE1} data.name=../x", "data.name=../x: letters"),
    (f"{TABLE1} threads=0", "threads=0: must be at least 1"),
    (f"{TABLE1} engine=steam", "engine=steam: there are"),
    (f"{TABLE1} device=tpu", "device=tpu: there are"),
    (f"{TABLE1} +colour=red", "colour: Key 'colour'"),
    ("model.name=a,b/c", "model.name=b/c: letters"),
    ("model.cell=lstm,rnn", "model.cell=rnn: there are lstm, gru"),
    ("model.policy=skip,never", "model.policy=never: there are"),
    ("training.learning_rate=1e-3,0", "training.learning_rate=0"),
    ("training.learning_rate=1e-3,1e300", "training.learning_rate=1e.300: must be positive"),
    ("seed=0,9223372036854775808", "seed=9223372036854775808: must be 0 or more"),
    ("seed=0,1.5", "seed: Value '1.5'"),
    ("engine=auto,steam", "engine=steam: there are"),
    ("device=cpu,tpu", "device=tpu: there are"),
    ("threads=1,0", "threads=0: must be at least 1"),
    ("+data.pixels=1,3", "data=digits: pixels must be"),
    ("data._target_=os.system", r"no conf/data/\*.yaml has the _target_ os.system"),
    ("hydra.launcher.n_jobs=null", "hydra.launcher.n_jobs=None: a number of processes"),
    ("hydra.launcher.n_jobs=1.5", "hydra.launcher.n_jobs=1.5: a number of processes"),
    ("seed=range(0)", "the sweep holds no runs: check its overrides"),
    ("seed=range(3,1)", "the sweep holds no runs"),
    ("seed=0,0", "the sweep asks for the same run twice"),
    ("seed=0,abc", "seed: Value 'abc'"),
    ("seed=0,-1", "seed=-1: must be 0 or more"),
    ("seed=", "seed: "),
    ("model.cost_per_sample=1e-4,inf", "model.cost_per_sample=inf: λ must be finite"),
    ("model.hidden_size=4,0", "model.hidden_size=0: must be at least 1"),
    ("training.batch_size=64,0", "training.batch_size=0: must be at least 1"),
    ("data.drop_last=true,maybe", "data.drop_last=maybe: must be bool"),
    ("training.batch_size=64,5000 data.drop_last=true", "batch_size 5000 with drop_last leaves none"),
    ("data.name=../../x", "data.name=../../x: letters"),
    ("engine=compact", "the compact engine can't run this"),
    ("output=/proc/skiprnn", "output=/proc/skiprnn: cannot write /proc/skiprnn"),
    ("threads=100000000", "threads=100000000: must be at most 1024"),
    ("pack=0,1", "pack=0: must be at least 1"),
    ("hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs=0: a number of processes, or -1"),
    ("hydra.launcher.n_jobs=many", "hydra.launcher.n_jobs=many: a number of processes"),
    ("hydra.launcher.n_jobs=1000000000", "hydra.launcher.n_jobs=1000000000: a number of processes, .* at most 1024"),
]


@pytest.mark.parametrize(("overrides", "message"), SWEEPS, ids=[overrides for overrides, _ in SWEEPS])
def test_a_sweep_is_refused(overrides, message, refused, capsys):
    given = parse([*SMALL, *FEW, *PLACES, *overrides.split()])
    launcher = {one.get_key_element().split(".")[-1]: one.value() for one in given if "hydra." in one.input_line}
    grid = BasicSweeper.split_arguments([one for one in given if "hydra." not in one.input_line], None)[0]

    def find_place(output):
        return ProcessesLauncher(**launcher).place(output, None)

    refused(lambda: sweep.run(grid, config_of, find_place, overrides, None, None), message)


HYDRA = [
    ("model=null", "model=null: Config group override must be a string or a list"),
    ("-m model=null", "model=null: Config group override must be a string or a list"),
    ("--run --multirun", "Only one of --run, --multirun"),
    ("--resolve", "The --resolve flag can only be used"),
    ("--colour", "unrecognized arguments: --colour.*; see --help"),
    ("seed=1 -m model=gru", "unrecognized arguments: model=gru"),
    ("--cfg everything", "argument --cfg/-c: invalid choice: 'everything'"),
    ("--config-dir nowhere", "Additional config directory .*nowhere' not found"),
    ("--config-name nothing", "Cannot find primary config 'nothing'"),
    (f"seed={5000 * '9'}", "Exceeds the limit"),
    (
        "profile=mnist/smoke",
        "is not for data=digits: add experiment=NAME or data=mnist, or profile=digits/NAME, of cpu",
    ),
    ("-m profile=mnist/smoke seed=0,1", "profile=mnist/smoke is not for data=digits: add experiment=NAME or "),
    ("data=adding", "profile=digits/cpu is not for data=adding: add profile=adding/NAME, of cpu, long, paper, smoke"),
    ("-m data=adding", "profile=digits/cpu is not for data=adding"),
    ("-m data=adding,digits", "profile=digits/cpu is not for data=adding"),
    ("-m experiment=table1", "profile=digits/cpu is not for data=mnist: add profile=mnist/NAME"),
    ("seeds=[1,2]", r"seeds=\[1,2\]: add experiment=NAME"),
    ("rows=[1]", r"rows=\[1\]: add experiment=NAME"),
    ("logger=3", "Config group override must be a string or a list"),
    ("profile=[] +training.epochs=1", "epochs|training"),
    ("logger=[nothing]", "Could not load 'logger/nothing'"),
    ("model=nothing", "Could not find 'model/nothing' Available options in 'model': gru lstm"),
    ("profile=mnist/nothing", "Could not find 'profile/mnist/nothing'"),
    ("colour=red", r"Could not override 'colour'. To append to your config use \+colour=red"),
    ("model.hidden_size", "mismatched input '<EOF>' expecting '='|missing EQUAL"),
    ("model.hidden_size=[1", "no viable alternative at input"),
    ("-m model=skip_lstm,nothing", "Could not find 'model/nothing'"),
    ("-m hydra/launcher=nothing", "Could not find 'hydra/launcher/nothing'"),
]


@pytest.mark.parametrize(("arguments", "message"), HYDRA, ids=[arguments for arguments, _ in HYDRA])
def test_what_hydra_refuses_is_one_line_too(arguments, message, refused, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as the command does: here it is set back
    monkeypatch.setattr("sys.argv", ["skiprnn.train", *arguments.split(), *PLACES])
    refused(train.main, message)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        *((claims, []), (dashboard, []), (bench, []), (sitting, ["train", "folder"])),
        *((ucf101, ["extract"]), (ucf101, ["convert"])),
    ],
)
def test_the_other_commands_refuse_arguments_in_one_line(module, arguments, refused, capsys):
    refused(lambda: module.main([*arguments, "--colour"]), r"; see --help$")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argument", ["model=null", "model=nothing"])
def test_what_is_asked_of_a_table_is_refused_as_in_training(argument, refused):
    refused(lambda: tables.main(["experiment=table1", "profile=mnist/smoke", argument]), "model")


@pytest.mark.parametrize("argument", ["model.cost_per_sample=-1", "model=nothing"])
def test_the_command_shows_one_line_and_no_traceback(argument, tmp_path):
    done = command(argument, f"output={tmp_path / 'out'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
