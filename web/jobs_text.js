// What the panel says, in ComfyUI's language: its own translations are not open to extensions' pages.
import { app } from "../../scripts/app.js";

const TEXTS = {
  en: {
    title: "Kandinsky 5 jobs", short: "K5 jobs", jobs: "Training jobs", empty: "No training jobs yet.",
    emptyHint: "Start one with the node “{node}”; it goes on while you work.", loading: "Looking for jobs…",
    unreachable: "Server not reachable, trying again…", stop: "Stop", stopHint: "Stop: saves first, so that it can go on later",
    stopping: "Stopping…", resume: "Resume", resumeHint: "Resume from the last checkpoint", delete: "Delete",
    deleteHint: "Delete the job with its checkpoints and samples", open: "Open folder", copyId: "Copy the job's id",
    copyResult: "Copy the result's path", copied: "Copied", deleteTitle: "Delete this training job?",
    deleteMessage: "Its checkpoints, samples, log and any result inside its folder are deleted for good:",
    step: "step {step} of {total}", left: "{time} left", took: "took {time}", pace: "{time} s a step", loss: "Loss", smoothed: "smoothed", raw: "each step", validation: "validation",
    best: "Best validation", rate: "Learning rate", time: "Time", leftFact: "Time left", memory: "Memory peak", model: "Model",
    trains: "Trains", full: "all weights", cache: "cache only", result: "Result", chart: "Loss by step", chartEmpty: "The curve appears with the first steps.",
    thinned: "{shown} of {total} steps shown; peaks are kept", logScale: "Logarithmic loss axis", chartHint: "Drag to zoom, double click for all",
    samples: "Samples", samplesEmpty: "Samples appear while it trains.", noSamples: "This job makes no samples.", stepName: "Step", sampleStep: "Step {step}", sampleOf: "Sample of step {step}: {prompt}",
    earlier: "{count} earlier", log: "Log", logEmpty: "Nothing printed yet.", material: "Material", close: "Close", previousStep: "Earlier step",
    nextStep: "Later step", previousPrompt: "Previous prompt", nextPrompt: "Next prompt", failed: "That did not work",
    state: { starting: "starting", waiting: "waiting", loading: "loading", caching: "caching", training: "training", saving: "saving", done: "done", stopped: "stopped", failed: "failed", lost: "cut off" },
    units: ["d", "h", "min", "s"],
  },
  ru: {
    title: "Обучение Kandinsky 5", short: "Обучение K5", jobs: "Задания обучения", empty: "Заданий обучения пока нет.",
    emptyHint: "Запустите обучение узлом «{node}»; оно идёт, пока вы работаете.", loading: "Ищем задания…",
    unreachable: "Сервер недоступен, пробуем снова…", stop: "Остановить", stopHint: "Остановить: сначала сохранит, чтобы можно было продолжить",
    stopping: "Останавливается…", resume: "Продолжить", resumeHint: "Продолжить с последней контрольной точки", delete: "Удалить",
    deleteHint: "Удалить задание с контрольными точками и примерами", open: "Открыть папку", copyId: "Скопировать id задания",
    copyResult: "Скопировать путь к результату", copied: "Скопировано", deleteTitle: "Удалить это задание обучения?",
    deleteMessage: "Контрольные точки, примеры, журнал и результат в папке задания будут удалены безвозвратно:",
    step: "шаг {step} из {total}", left: "осталось {time}", took: "заняло {time}", pace: "{time} с на шаг", loss: "Ошибка", smoothed: "сглаженная", raw: "каждый шаг", validation: "проверка",
    best: "Мин. проверка", rate: "Скорость обучения", time: "Время", leftFact: "Осталось", memory: "Пик памяти", model: "Модель",
    trains: "Обучается", full: "все веса", cache: "только кэш", result: "Результат", chart: "Ошибка по шагам", chartEmpty: "Кривая появится с первыми шагами.",
    thinned: "показано {shown} из {total} шагов; пики сохранены", logScale: "Логарифмическая шкала ошибки", chartHint: "Выделите мышью для увеличения, двойной щелчок — всё",
    samples: "Примеры", samplesEmpty: "Примеры появятся во время обучения.", noSamples: "Это задание не делает примеров.", stepName: "Шаг", sampleStep: "Шаг {step}", sampleOf: "Пример шага {step}: {prompt}",
    earlier: "Ещё {count} более ранних", log: "Журнал", logEmpty: "Пока пусто.", material: "Материал", close: "Закрыть", previousStep: "Более ранний шаг",
    nextStep: "Более поздний шаг", previousPrompt: "Предыдущий промпт", nextPrompt: "Следующий промпт", failed: "Не получилось",
    state: { starting: "запуск", waiting: "ожидание", loading: "загрузка", caching: "кэширование", training: "обучение", saving: "сохранение", done: "готово", stopped: "остановлено", failed: "ошибка", lost: "прервано" },
    units: ["д", "ч", "мин", "с"],
  },
  zh: {
    title: "Kandinsky 5 训练任务", short: "K5 训练", jobs: "训练任务", empty: "还没有训练任务。",
    emptyHint: "用节点“{node}”开始训练；训练期间可以继续工作。", loading: "正在查找任务…",
    unreachable: "无法连接服务器，正在重试…", stop: "停止", stopHint: "停止：先保存，之后可以继续",
    stopping: "正在停止…", resume: "继续", resumeHint: "从最后一个检查点继续", delete: "删除",
    deleteHint: "删除任务及其检查点和样本", open: "打开文件夹", copyId: "复制任务 id",
    copyResult: "复制结果路径", copied: "已复制", deleteTitle: "删除这个训练任务？",
    deleteMessage: "其检查点、样本、日志以及任务文件夹内的结果将被永久删除：",
    step: "第 {step} / {total} 步", left: "剩余 {time}", took: "用时 {time}", pace: "每步 {time} 秒", loss: "损失", smoothed: "平滑", raw: "每一步", validation: "验证",
    best: "最佳验证", rate: "学习率", time: "时间", leftFact: "剩余时间", memory: "内存峰值", model: "模型",
    trains: "训练内容", full: "全部权重", cache: "仅缓存", result: "结果", chart: "各步损失", chartEmpty: "训练开始后显示曲线。",
    thinned: "显示 {total} 步中的 {shown} 步；峰值已保留", logScale: "对数损失轴", chartHint: "拖动放大，双击显示全部",
    samples: "样本", samplesEmpty: "训练过程中会出现样本。", noSamples: "此任务不生成样本。", stepName: "步数", sampleStep: "第 {step} 步", sampleOf: "第 {step} 步的样本：{prompt}",
    earlier: "更早的 {count} 组", log: "日志", logEmpty: "还没有输出。", material: "素材", close: "关闭", previousStep: "较早的步",
    nextStep: "较晚的步", previousPrompt: "上一个提示词", nextPrompt: "下一个提示词", failed: "操作失败",
    state: { starting: "启动中", waiting: "等待中", loading: "加载中", caching: "缓存中", training: "训练中", saving: "保存中", done: "完成", stopped: "已停止", failed: "失败", lost: "已中断" },
    units: ["天", "小时", "分", "秒"],
  },
};

const language = () => String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en").slice(0, 2);

// A text by its key, with {names} filled in.
export function t(key, values = {}) {
  const texts = TEXTS[language()] ?? TEXTS.en;
  return texts[key].replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export const stateName = (state) => (TEXTS[language()] ?? TEXTS.en).state[state] ?? state;

// The two largest units: "1 h 3 min".
export function duration(seconds) {
  const total = Math.max(0, Math.round(seconds));
  const units = (TEXTS[language()] ?? TEXTS.en).units;
  const parts = [Math.floor(total / 86400), Math.floor(total / 3600) % 24, Math.floor(total / 60) % 60, total % 60];
  const first = Math.min(parts.findIndex((part) => part > 0) >>> 0, 3);
  return [first, first + 1].filter((at) => at === first || (parts[at] > 0 && at < 4)).map((at) => `${parts[at]} ${units[at]}`).join(" ");
}

export const number = (value, digits = 4) =>
  value === null || value === undefined ? "—" : Number(value).toLocaleString(language(), { maximumSignificantDigits: digits });

export const gibibytes = (bytes) => (bytes > 0 ? `${number(bytes / 2 ** 30, 3)} GiB` : "—");
