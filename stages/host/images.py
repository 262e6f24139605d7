"""`docker/build`: makes the images that stages run in, each from one recipe, tested before it gets its tag."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import click

from stages.harness.errors import InputError
from stages.harness.params import IMAGES, Run, read_params, section
from stages.host.engines import client, podmans_own
from stages.host.provenance import recipe, recipe_files


@click.command()
@click.argument("images", nargs=-1, type=click.Choice(IMAGES))
@click.option("--engine", type=click.Choice(["docker", "podman"]), help="default: run.engine, else the one that is here")
@click.option("--base", help="build on this image instead of the Dockerfile's (a mirror's copy, a company's)")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), help="certificates to trust while building")
@click.option("--index", type=click.Path(exists=True, dir_okay=False), help="a file with the URL of a package index to use")
@click.option("--wheels", type=click.Path(exists=True, file_okay=False), envvar="PIP_FIND_LINKS", help="a folder of wheels to look into first")
@click.option("--network", help="the engine's network for the build, such as host")
@click.option("--no-cache", is_flag=True, help="build every layer anew")
def main(images: tuple[str, ...], engine: str | None, base: str | None, ca: str | None, index: str | None,
         wheels: str | None, network: str | None, no_cache: bool) -> None:  # fmt: skip
    """Builds IMAGES (default: those that params.yaml's roles name), tests each from inside, then tags it."""
    tree = Path.cwd()
    try:
        values = read_params(tree / "params.yaml")
        engine = engine or _engine(section(Path("params.yaml"), values, "run", Run).engine)
        options = ["--network", network] if network else []
        options += ["--no-cache"] if no_cache else []
        options += ["--build-arg", f"SLIM={base}", "--build-arg", f"CUDA={base}"] if base else []
        for name, file in (("ca", ca), ("index", index)):
            options += ["--secret", f"id={name},src={os.path.abspath(file)}"] if file else []
        _check_builder(engine)
        for image in images or sorted(set(values["images"].values())):
            build(tree, image, client(engine), options, Path(wheels) if wheels else None)
    except InputError as error:
        raise click.ClickException(str(error)) from None


def build(tree: Path, image: str, client: str, options: list[str], wheels: Path | None) -> None:
    """Builds one image under a passing name, runs docker/self_test.py in it, and tags it by its recipe's hash."""
    if not (tree / "docker" / f"{image}.lock").is_file():
        raise InputError(f"docker/{image}.lock is missing: write it with `docker/lock {image}`")
    made_of = recipe(tree, image)
    tag, trial = f"mathmind/{image}:{made_of}", f"mathmind/{image}:untested"
    with tempfile.TemporaryDirectory(prefix="mathmind-build-") as folder:
        context = Path(folder)
        for name in recipe_files(image):
            shutil.copy2(tree / "docker" / name, context / name)
        (context / "wheels").mkdir()
        for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
            shutil.copy2(wheel, context / "wheels")
        arguments = ["--build-arg", f"IMAGE={image}", "--build-arg", f"RECIPE={made_of}", *options]
        environment = {**os.environ, "DOCKER_BUILDKIT": "1"}  # docker's older builder knows no secrets
        command = [client, "build", "--file", str(context / "Dockerfile"), "--tag", trial, *arguments, str(context)]
        if subprocess.run(command, env=environment).returncode:
            raise InputError(f"{image} did not build: {Path(client).name}'s own words stand above")
    tested = subprocess.run(
        [client, "run", "--rm", "--network", "none", *podmans_own(Path(client).name), "--mount", f"type=bind,source={tree}/docker,target=/docker,readonly",
         trial, "python", "-B", "/docker/self_test.py", f"{image}.lock", f"{image}.in"],
        capture_output=True, text=True)  # fmt: skip
    if tested.returncode:
        raise InputError(f"{image} was built and is not fit: {' | '.join((tested.stdout + tested.stderr).split(chr(10)))}")
    subprocess.run([client, "tag", trial, tag], check=True)
    subprocess.run([client, "rmi", trial], check=True, capture_output=True)
    size = int(subprocess.run([client, "image", "inspect", "--format", "{{.Size}}", tag], capture_output=True, text=True).stdout)
    click.echo(f"{tag}: {size / 1e9:.2f} GB, {tested.stdout.strip()}")


def _check_builder(engine: str) -> None:
    """docker's clients from 23 on build with a plugin; their older builder knows no secrets and no mounts."""
    if engine != "docker" or subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode == 0:
        return
    asked = subprocess.run(["docker", "version", "--format", "{{.Client.Version}}"], capture_output=True, text=True)
    version = asked.stdout.strip()
    if int(version.split(".")[0] or 0) >= 23:
        raise InputError(f"docker {version} builds with buildx, which is not here: install docker-buildx, or use --engine podman")


def _engine(chosen: str) -> str:
    if chosen in ("docker", "podman"):
        return chosen
    for engine in ("docker", "podman"):
        if shutil.which(engine):
            return engine
    raise InputError("there is neither docker nor podman here: install one of them")


if __name__ == "__main__":
    main()
