"""What model.json says of the data of a model, and of their preprocessing."""

from __future__ import annotations

from volseg.manuscript.facts import Sentence, Topic, clause, sentence

SEGMENTS, CLASSIFIES = {"recipe.task": "segment"}, {"recipe.task": "classify"}
NUMBERS = {"recipe.data.kind": "number"}
# Of a model from elsewhere, the settings of training and the partitions are not known.
IMPORTED, FOLDS = "model.origin", "metrics.networks"
NORMALISE, SCALE = "recipe.preprocess.normalise", "recipe.images.normalise"

CASES: tuple[Sentence, ...] = (
    sentence("Training data: {recipe.data_source}", items=(7,), topic=Topic.DATA),
    # ---- a model that segments
    sentence(
        clause(
            "The network was trained on {metrics.training_cases:count} scans", FOLDS, when=SEGMENTS
        ),
        " and validated on {metrics.validation_cases:count} others",
        items=(19, 35),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "The network was trained on {fingerprint.n_cases:count} scans",
            FOLDS,
            "metrics.training_cases",
            IMPORTED,
            when=SEGMENTS,
        ),
        " and validated on {metrics.validation_cases:count} others",
        items=(19, 35),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "In cross-validation, {metrics.networks:count} networks were trained on "
            "{metrics.training_cases:count} scans",
            when=SEGMENTS,
        ),
        "; each of {metrics.validation_cases:count} scans was predicted by a network that had "
        "not seen it in training",
        items=(19, 35),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "No patient was in both training and validation (volseg {model.versions.volseg}); "
            "a scan whose patient the dataset does not name counts as one patient",
            IMPORTED,
            when=SEGMENTS,
        ),
        items=(20,),
        topic=Topic.DATA,
    ),
    sentence(
        "The labels of the reference masks, with their values, are {recipe.data.labels:pairs}",
        items=(14,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "The training scans had voxels of {fingerprint.spacings_mm:spans} mm and "
            "{fingerprint.shapes:spans} voxels along R, A, S",
            IMPORTED,
            when=SEGMENTS,
        ),
        items=(13,),
        topic=Topic.DATA,
    ),
    sentence("Intensities are in {recipe.data.intensity_unit}", items=(13,), topic=Topic.DATA),
    sentence(
        clause("A case that lacked a channel was refused", when={"recipe.data.missing": "error"}),
        items=(12,),
    ),
    sentence(
        clause(
            "A missing channel was set to zero after normalisation",
            when={"recipe.data.missing": "empty"},
        ),
        items=(12,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "Channels were resampled to the grid of the first", when={"recipe.data.grids": "first"}
        ),
        clause(" after rigid registration to it", when={"recipe.data.align": "rigid"}),
        items=(9,),
        topic=Topic.DATA,
    ),
    # ---- a model that classifies images
    sentence(
        clause(
            "The network was trained on {fingerprint.n_images:count} images of "
            "{fingerprint.n_patients:count} patients",
            FOLDS,
            when=CLASSIFIES,
        ),
        " and validated on {fingerprint.n_validation:count} other images",
        items=(19, 35),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "In cross-validation, {metrics.networks:count} networks were trained; each image "
            "was predicted by a network that had not seen it in training",
            when=CLASSIFIES,
        ),
        items=(19,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "An image without a named patient counts as one patient (volseg "
            "{model.versions.volseg})",
            when=CLASSIFIES,
        ),
        clause(
            "; images that look alike, or are of one patient, were kept on one side of the "
            "partition",
            "metrics.warnings",
        ),
        items=(20,),
        topic=Topic.DATA,
    ),
    sentence(
        "The reference standard is the column {recipe.data.target} of the dataset",
        clause(": {recipe.data.classes:list}"),
        items=(14,),
        topic=Topic.DATA,
    ),
    sentence(
        "Training images per class: {fingerprint.counts:pairs}", items=(36,), topic=Topic.DATA
    ),
    sentence(
        clause(
            "The mean of {recipe.data.target} in training was {fingerprint.mean:number}, its "
            "standard deviation {fingerprint.sd:number}",
            when=NUMBERS,
        ),
        items=(36,),
        topic=Topic.DATA,
    ),
    sentence(
        "The training images had {fingerprint.sizes:spans} pixels (height × width)",
        items=(13,),
        topic=Topic.DATA,
    ),
)


# ---- preprocessing


def _normalised(method: str, text: str) -> Sentence:
    """Return the sentence on a normalisation of scans."""
    first = clause(text.replace("@", NORMALISE), when={f"{NORMALISE}.method": method})
    others = "; other settings hold for the channels {recipe.preprocess.normalise_channels:list}"
    return sentence(first, others, items=(9,), topic=Topic.DATA)


def _scaled(method: str, text: str, **when: str) -> Sentence:
    """Return the sentence on a normalisation of images; `when` are further settings of it."""
    conditions = {f"{SCALE}.{name}": value for name, value in {"method": method, **when}.items()}
    standardised = ", then {@.mean:list} was subtracted and the result divided by {@.sd:list}"
    first = clause(text.replace("@", SCALE), when=conditions)
    return sentence(first, standardised.replace("@", SCALE), items=(9,), topic=Topic.DATA)


PREPROCESSING: tuple[Sentence, ...] = (
    sentence(
        "Scans were resampled to voxels of {recipe.preprocess.spacing_mm:sizes} mm",
        " by {recipe.preprocess.interpolation} interpolation",
        items=(9,),
        topic=Topic.DATA,
    ),
    sentence(
        clause("Scans were cropped to the body", when={"recipe.preprocess.crop": "body"}),
        items=(9,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "Scans were cropped to their nonzero voxels", when={"recipe.preprocess.crop": "nonzero"}
        ),
        items=(9,),
        topic=Topic.DATA,
    ),
    _normalised(
        "window",
        "Intensities were clipped to {@.low:number} to {@.high:number}; then {@.mean:number} "
        "was subtracted and the result divided by {@.sd:number}",
    ),
    _normalised(
        "zscore",
        "The mean intensity of each scan was subtracted and the result divided by the standard "
        "deviation (region: {@.region})",
    ),
    _normalised(
        "percentile",
        "Intensities of each scan were scaled and clipped between their percentiles "
        "{@.low_percent:number} and {@.high_percent:number} (region: {@.region})",
    ),
    _normalised(
        "histogram",
        "The histogram of each scan was equalised with {@.bins:number} levels (region: {@.region})",
    ),
    _normalised(
        "scale",
        "Of all intensities {@.subtract:number} was subtracted; the result was divided by "
        "{@.divide_by:number}",
    ),
    sentence(
        "A coarse first pass at {recipe.roi.spacing_mm:sizes} mm found the region in which the "
        "network ran, with a margin of {recipe.roi.margin_mm:number} mm",
        items=(10,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "The network saw slices through each lesion ({recipe.images.planes:list}) of "
            "{recipe.images.field_of_view_mm:number} mm",
            when={"recipe.data.input": "lesion"},
        ),
        items=(10,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "The network saw {recipe.images.slice_axis} slices of volumes",
            when={"recipe.data.input": "slice"},
        ),
        items=(10,),
        topic=Topic.DATA,
    ),
    sentence(
        clause(
            "Images were scaled to squares with an edge of {recipe.images.pixels:number} pixels",
            when={"recipe.data.input": "image"},
        ),
        " ({recipe.images.fit})",
        items=(9,),
        topic=Topic.DATA,
    ),
    *(
        sentence(
            clause(
                "Slices were scaled to squares with an edge of {recipe.images.pixels:number} "
                "pixels",
                when={"recipe.data.input": kind},
            ),
            " ({recipe.images.fit})",
            items=(9,),
            topic=Topic.DATA,
        )
        for kind in ("slice", "scan")
    ),
    sentence(
        clause(
            "Slices were sampled as squares with an edge of {recipe.images.pixels:number} pixels",
            when={"recipe.data.input": "lesion"},
        ),
        items=(9,),
        topic=Topic.DATA,
    ),
    _scaled(
        "scale",
        "Intensities were divided by the largest value of the type of the file",
        divide_by="white",
    ),
    _scaled("scale", "Intensities were divided by {@.divide_by:number}"),
    _scaled(
        "window",
        "Intensities were clipped to {@.low:number} to {@.high:number} and scaled between these",
    ),
    _scaled(
        "percentile",
        "Intensities of each image were scaled and clipped between their percentiles "
        "{@.low_percent:number} and {@.high_percent:number}",
    ),
    _scaled("histogram", "The histogram of each image was equalised with {@.bins:number} levels"),
    _scaled(
        "zscore",
        "The mean intensity of each image was subtracted and the result divided by the "
        "standard deviation",
    ),
)
