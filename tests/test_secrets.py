"""No secret of a URI comes out of the one place that takes them out, nor of the command line."""

import string

import pytest
import yaml
from conftest import ROOT, command, tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from unet.runs.run import Run, where
from unet.secrets import lost, without_credentials, without_secrets
from unet.storage import Folder
from unet.tracking.reach import ranking

# Long enough not to stand in the rest of a URI by chance; what ends a host or a value is among it.
PLAIN = string.ascii_letters + string.digits
SECRETS = st.text(PLAIN + "#?@:+=%.~!*_-", min_size=8, max_size=40).filter(lambda s: set(s) & set(PLAIN))
VALUES = st.text(PLAIN + "/+=%@:.,~!*_-", min_size=8, max_size=40)
NAMES = st.sampled_from(
    ["secret_key", "access_key", "token", "api-key", "X-Amz-Signature", "PASSWORD", "sig", "credential"]
)
SCHEMES = st.sampled_from(["http", "https", "s3", "gs", "postgresql", "mysql+pymysql"])
HIDDEN = st.one_of(
    st.builds(lambda scheme, s: (s, f"{scheme}://{s}@host.org:5000/a/b.db"), SCHEMES, SECRETS),
    st.builds(lambda scheme, s: (s, f"{scheme}://me:{s}@host"), SCHEMES, SECRETS),
    st.builds(lambda scheme, s: (s, f"{scheme}://:{s}@10.0.0.1/x@y?region=z"), SCHEMES, SECRETS),
    st.builds(
        lambda s, cut: (s, f"s3://KEY:p{s[:cut]}/{s[cut:]}@bucket/p"),
        SECRETS.filter(lambda s: "/" not in s),
        st.just(0),
    ),
    st.builds(lambda name, s: (s, f"s3://bucket/p?region=x&{name}={s}&scheme=http"), NAMES, VALUES),
    st.builds(lambda name, s: (s, f"https://host/p?{name}={s}"), NAMES, VALUES),
)


@given(HIDDEN, st.sampled_from(["{}", "cannot open {}: refused", "'{}' (see http://docs.org/a@b)", '{{"uri": "{}"}}']))
def test_a_secret_never_comes_out(hidden, sentence):
    secret, uri = hidden
    shown = without_secrets(sentence.format(uri))
    assert secret not in shown and lost(shown)
    assert without_secrets(shown) == shown


PARTS = st.text(PLAIN + "._-", min_size=1, max_size=12)


@given(SCHEMES, PARTS, PARTS, st.integers(1, 65535))
def test_what_has_no_secret_stays(scheme, host, name, port):
    for uri in (
        f"{scheme}://{host}/{name}@{host}/x.db",
        f"{scheme}://{host}:{port}/{name}@{host}?region={name}&endpoint_override={host}:{port}",
        f"{scheme}://[::1]:{port}/a@{name}",
        f"sqlite:////home/{name}@{host}/x.db",
        f"/home/{name}@{host}/x: {name}@{host} at {host}:{port}",
        f"synthetic:{port}",
    ):
        assert without_secrets(uri) == uri and not lost(uri)


@given(PARTS, PARTS, SECRETS)
def test_an_account_of_azure_and_google_s_anonymous_are_no_secrets(account, bucket, secret):
    """Without them the URI would name another place, or none."""
    account = account.replace(".", "-")
    for uri in (
        f"abfs://{account}@{bucket}/runs",
        f"abfss://{bucket}@{account}.dfs.core.windows.net/runs?enable_tls=true",
        f"abfs://{account}@127.0.0.1:10000/{bucket}/runs?enable_tls=false",
        f"gs://anonymous@{bucket}/runs?scheme=http",
    ):
        assert without_secrets(uri) == without_credentials(uri) == uri and not lost(uri)
    for uri in (f"abfs://me:{secret}@pets/runs", f"gs://x{secret}@pets/runs"):
        assert secret not in without_secrets(uri) and lost(without_secrets(uri))


def test_a_token_of_azure_leaves_a_typed_uri_as_a_whole():
    uri = "abfs://me@pets/runs?enable_tls=false&sv=2024-11-04&se=2030-01-01&sr=c&sp=rwdl&sig=s3cr3t%3D"
    assert without_credentials(uri) == "abfs://me@pets/runs?enable_tls=false" and lost(without_secrets(uri))


S3 = "s3://AKIAKEY:hunter2%2Fsesame@bucket/runs?region=x"
BLOB = f"{S3}&secret_key=opensesame"
HTTP = "http://me:swordfish@127.0.0.1:9"
WORDS = ("AKIAKEY", "hunter2", "opensesame", "swordfish", "ordfish")


def test_a_run_saves_and_shows_none(tmp_path):
    settings = tiny_settings(BLOB, S3, tracking_uri=HTTP)
    assert not any(word in str(Folder(S3)) for word in WORDS) and str(Folder(S3)).endswith("@bucket/runs")
    run = Run("named", settings, Folder(tmp_path / "named"))
    run.start()
    saved = (tmp_path / "named" / "config.yaml").read_text()
    assert not any(word in saved + where(settings.run) for word in WORDS)
    assert yaml.safe_load(saved)["storage_path"].endswith("@bucket/runs?region=x&secret_key=***")
    # What went to a worker is shown by Ray as text.
    from unet.training.job import Job

    job = Job(settings, run.public_settings(), run.folder.uri, 1, "digest", (), None, None, None)
    assert not any(word in str(job) + str(job.public_settings) for word in WORDS)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("train", [f"--tracking-uri={HTTP}"]),
        ("train", [f"--tracking-uri={HTTP}", "--debug"]),
        ("train", ["--tracking-uri=http://me:sw#ordfish@127.0.0.1:9"]),
        ("train", [f"--storage-path={BLOB}", "--tracking-uri=http://127.0.0.1:9"]),
        ("prepare", [f"--source={S3}"]),
        ("prepare", [f"--output={BLOB}"]),
    ],
)
def test_a_refusal_shows_none(name, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNET_STORAGE_PATH", str(tmp_path))
    assert command(name, *flags) == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err and ("Traceback" in captured.err) == ("--debug" in flags)
    assert not any(word in captured.out + captured.err for word in WORDS)


@pytest.mark.parametrize("flag", ["tracking_uri", "data"])
def test_a_resume_asks_for_what_was_not_saved(flag, tmp_path):
    from unet.commands.cli import parse
    from unet.config import TrainSettings
    from unet.errors import InputError

    values = {flag: S3 if flag == "data" else HTTP}
    Run("named", tiny_settings(tmp_path, **({"data": ROOT} | values)), Folder(tmp_path / "named")).start()
    flags, name = ["--resume=named", f"--storage-path={tmp_path}"], f"--{flag.replace('_', '-')}"
    with pytest.raises(InputError, match=rf"Give {name} again: the secret in .*\*\*\*@"):
        parse(TrainSettings, "", flags)
    settings = parse(TrainSettings, "", [*flags, f"{name}={values[flag]}"])
    assert {**settings.run.model_dump(), **settings.data.model_dump()}[flag] == values[flag]


def test_the_order_of_a_page_of_runs_is_no_secret():
    address = ranking("https://user:pass@host/mlflow/", "7", "val/best_mean_iou")
    assert without_secrets(address) == address and address.endswith("&orderByKey=metrics.%60val%2Fbest_mean_iou%60")
    assert address.startswith("https://***@host/mlflow/#/experiments/7/runs?workflowType=machine_learning&")
