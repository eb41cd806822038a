"""What can go wrong between this machine and the Hugging Face Hub, each as one line that says what to do."""

import errno
import ssl

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # the client it uses, under its lasting name

_STATUS = {
    401: "refused access (HTTP 401); set HF_TOKEN to a token that may read it, or run `hf auth login`",
    403: "refused access (HTTP 403); set HF_TOKEN to a token that may read it, or accept the repo's terms on its page",
    407: "was not reached: the proxy asks for a name and a password (HTTP 407); write them into HTTPS_PROXY",
    429: "has had too many requests from here (HTTP 429); wait some minutes, or set HF_TOKEN: it then allows more",
    451: "may not give it out here for legal reasons (HTTP 451); choose another repo",
}


def in_words(repo_id: str, error: BaseException, host: str) -> str | None:
    """One line for a user, or None for an error that is not the user's; host: the server's address."""
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated: accept its terms on {host}/{repo_id}, "
            "then run `hf auth login` or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo_id} does not exist on {host}, or is private; "
            "check the name (for example zai-org/GLM-4-9B-0414), or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} on {host} has no such revision; give a branch, a tag or a commit that it has"
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not a valid Hub repo id ({error}); use organisation/name"
    if isinstance(error, HfHubHTTPError):
        return _refused(repo_id, error, host)
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return _absent(repo_id, error, host)
    if isinstance(error, httpx.HTTPError | httpx.InvalidURL | httpx.StreamError):
        return _unreached(repo_id, error, host)
    if isinstance(error, ssl.SSLError):  # before anything was asked
        return f"this machine's certificates cannot be used ({_reason(error)}); check SSL_CERT_FILE and SSL_CERT_DIR"
    if isinstance(error, OSError):
        return _of_the_system(repo_id, error)
    return _misconfigured(error)


def _refused(repo_id: str, error: HfHubHTTPError, host: str) -> str:
    status = error.response.status_code
    if isinstance(error, EntryNotFoundError):
        name = error.response.request.url.path.rpartition("/")[2]  # what stands behind it may be a signature
        return f"{repo_id}: {host} lists {name} but does not have it; try again later or choose another repo"
    otherwise = f"answered HTTP {status}; try again later, or set HF_ENDPOINT to a mirror"
    return f"{repo_id}: {host} {_STATUS.get(status, otherwise)}"


def _absent(repo_id: str, error: BaseException, host: str) -> str:
    """The cache does not have it (or not all of it) and the Hub was not asked or did not answer."""
    if constants.HF_HUB_OFFLINE:
        return f"{repo_id} is not (or not wholly) in the cache and HF_HUB_OFFLINE is set; unset it to download"
    cause = error.__cause__ or error
    if isinstance(cause, HfHubHTTPError):
        return _refused(repo_id, cause, host)
    return _unreached(repo_id, cause, host)


def _unreached(repo_id: str, error: BaseException, host: str) -> str:
    reason = _reason(error)
    if _is_about_certificates(error):
        what = "if a proxy of your network reads what is sent, set SSL_CERT_FILE to a file with its certificate"
        return f"{host} cannot be trusted ({reason}); {what}, and check this machine's date"
    if isinstance(error, httpx.ProxyError):
        return f"{host} cannot be reached: the proxy refuses ({reason}); check HTTPS_PROXY and HTTP_PROXY"
    if isinstance(error, httpx.TimeoutException):
        reason = "no answer in time"
    return (
        f"{host} cannot be reached ({reason}) and {repo_id} is not (or not wholly) in the cache; "
        "check the network, or set HF_ENDPOINT to a mirror"
    )


def _is_about_certificates(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _of_the_system(repo_id: str, error: OSError) -> str:
    where = error.filename or constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{repo_id}: the disk is full ({where}); free some space, or set HF_HOME to a folder on another disk"
    return f"{repo_id} cannot be stored in {where} ({error.strerror or error}); set HF_HOME to a folder you can write"


def _misconfigured(error: BaseException) -> str | None:
    """What the HTTP client says of the proxies that the environment names."""
    if isinstance(error, ImportError) and "socksio" in str(error):
        return (
            "the environment names a SOCKS proxy (ALL_PROXY or HTTPS_PROXY), which needs one more package: "
            "run `pip install socksio`, or name an HTTP proxy"
        )
    if isinstance(error, ValueError) and "proxy" in str(error).lower():
        return (
            f"the environment names a proxy that cannot be used ({error}); correct HTTPS_PROXY, HTTP_PROXY, ALL_PROXY"
        )
    return None
