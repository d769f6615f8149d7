"Archives as other programs write them."
import io, tarfile


def make_tar(path, members, **kwargs):
    "Members are (name, bytes) or TarInfo."
    with tarfile.open(path, "w", **kwargs) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
