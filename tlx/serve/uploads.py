"""Pictures out of a request's body, which is counted while it comes: what its head promises is no limit."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

from fastapi import Request, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from tlx.serve.decoding import Refused
from tlx.serve.service import Limits, Upload, spooled

_FIELDS = 16  # of text, which are not looked at
_NAME = 255  # letters of a file's name that are said again
_TODO = "curl -F file=@photo.jpg, or --data-binary @photo.jpg"


async def uploads_of(request: Request, limits: Limits) -> list[Upload]:
    """The files of a form (multipart), or one picture that is the body itself.

    Raises:
        Refused: too many bytes or files, none, a body that is no form.
    """
    body = _counted(request, limits.body_bytes)
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        found = await _of_form(request, body, limits.files)
    else:
        file = UploadFile(spooled(), filename="picture")  # type: ignore[arg-type]
        try:
            async for chunk in body:
                await file.write(chunk)
        except BaseException:
            await file.close()
            raise
        found = [file]
    return [Upload((file.filename or "picture")[:_NAME], file.file) for file in found]


@contextmanager
def closed(uploads: Sequence[Upload]) -> Iterator[None]:
    """In here they are read; temporary files go with it."""
    try:
        yield
    finally:
        for upload in uploads:
            upload.file.close()


async def _of_form(request: Request, body: AsyncGenerator[bytes, None], most: int) -> list[UploadFile]:
    try:
        form = await MultiPartParser(request.headers, body, max_files=most, max_fields=_FIELDS).parse()
    except MultiPartException as error:
        why = error.message.removesuffix(".")
        if "Too many files" in why:
            raise Refused(413, f"more than {most} files in one request") from error
        raise Refused(400, f"the form cannot be read: {why}; {_TODO}") from error
    except (UnicodeError, ValueError) as error:  # of heads that strangers wrote
        raise Refused(400, f"the form cannot be read; {_TODO}") from error
    files = [value for _, value in form.multi_items() if not isinstance(value, str)]
    if not files:
        raise Refused(400, f"there is no file in this form; text is not looked at, and no URL is fetched: {_TODO}")
    return files  # type: ignore[return-value]  # starlette's, of which FastAPI's is a kind


async def _counted(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """
    Raises:
        Refused: more bytes than that, at the head that says so or at the first byte beyond.
    """
    refused = Refused(413, f"more than the {most / (1 << 20):g} MB that a request may have here")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > most:
        raise refused
    count = 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > most:
            raise refused
        yield chunk
